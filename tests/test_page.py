"""The chat page in a real browser, before the engine's server and before one that tests script.

It needs Chromium and its driver, which are Debian's packages chromium and chromium-driver.
"""

import asyncio
import json
import os
import re
import shutil

import pytest
from helpers import quick_start

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.tools.options import DEMO_MODEL

pytest.importorskip("fastapi")
pytest.importorskip("selenium")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    pytest.skip("Chromium and chromedriver are not installed", allow_module_level=True)

from fastapi import FastAPI, Request  # noqa: E402
from selenium import webdriver  # noqa: E402
from selenium.common.exceptions import TimeoutException  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402
from server_thread import running, serving  # noqa: E402
from starlette.responses import JSONResponse, StreamingResponse  # noqa: E402

from nanovllm_jax.server.page import page_response  # noqa: E402

DESKTOP, PHONE = (1280, 800), (360, 740)
QUESTION = "What is 345 + 678?"
STORY = "Tell me a story about a fox and a lantern."
LIMIT = 30  # seconds that the browser may take for anything


class Scripted:
    """A server whose answers a test lays out beforehand, and which keeps what it was asked.

    Attributes:
        replies: what comes next, first of all: a list of deltas, or (status, message, headers).
        asked: the bodies of the requests.
        pause: seconds between deltas.
        was_left: a client has gone away from a stream.
    """

    def __init__(self):
        self.replies, self.asked, self.pause, self.was_left = [], [], 0.0, False
        self.app = FastAPI()
        self.app.get("/")(page_response)
        self.app.get("/v1/models")(self.models)
        self.app.post("/v1/chat/completions")(self.chat)

    def models(self):
        return {"data": [{"id": "scripted", "max_model_len": 512}]}

    async def chat(self, http: Request):
        self.asked.append(await http.json())
        reply = self.replies.pop(0)
        if isinstance(reply, tuple):
            status, message, headers = reply
            return JSONResponse({"error": {"message": message}}, status, headers)
        return StreamingResponse(self.stream(reply), media_type="text/event-stream")

    async def stream(self, deltas):
        """Sends the deltas; None breaks the connection off, an exception is told as an error."""
        try:
            for count, delta in enumerate(deltas, 1):
                if delta is None:
                    return
                if isinstance(delta, Exception):
                    chunk = {"error": {"message": str(delta)}}
                else:
                    usage = {"completion_tokens": count, "total_tokens": 10 + count}
                    chunk = {"choices": [{"delta": delta, "finish_reason": None}], "usage": usage}
                yield f"data: {json.dumps(chunk)}\n\n"
                await asyncio.sleep(self.pause)
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.was_left = True
            raise


class Page:
    """The page as somebody uses it."""

    def __init__(self, driver, url):
        self.driver = driver
        driver.get(url)

    def find(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def until(self, condition):
        try:
            return WebDriverWait(self.driver, LIMIT, 0.02).until(lambda _: condition())
        except TimeoutException:
            pytest.fail(f"did not come about; the page says:\n{self.find('body').text}")

    def say(self, text):
        field = self.find("#text")
        before = field.get_property("value")
        field.send_keys(text)
        if field.get_property("value") == before:
            # After a dialog has been closed, a headless tab gets keys now and then without their
            # text: `keydown` comes, `input` does not.
            self.run(f"setText({json.dumps(before + text)})")
        field.send_keys(Keys.ENTER)

    def is_idle(self):
        return self.find("#send").text == "Send"

    def ask(self, text):
        """Send a message, and wait for the end of its answer."""
        self.say(text)
        self.until(self.is_idle)

    def click(self, text, within="body"):
        [button] = [b for b in self.all(f"{within} button") if b.text == text]
        button.click()

    def answers(self):
        return [answer.text for answer in self.all("article.assistant > .text")]

    def run(self, script):
        return self.driver.execute_script(script)


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    flags = ["--headless=new", "--disable-dev-shm-usage", "--disable-gpu", "--lang=en"]
    if os.geteuid() == 0:
        flags.append("--no-sandbox")  # which root cannot have; it opens this one page only
    for flag in flags:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(LIMIT)
    driver.set_script_timeout(LIMIT)
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def open_page(browser):
    """Give a function that opens the page in a new tab: open_page(url, (width, height)) -> Page."""

    def open_page(url, size=DESKTOP):
        browser.switch_to.new_window("tab")
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1}
        is_phone = size == PHONE
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", metrics | {"mobile": is_phone}
        )
        touch = {"enabled": is_phone, "maxTouchPoints": 1}
        browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", touch)
        return Page(browser, url)

    first = browser.current_window_handle
    yield open_page
    wrong = [entry["message"] for entry in browser.get_log("browser")]
    for handle in browser.window_handles:
        if handle != first:
            browser.switch_to.window(handle)
            browser.close()
    browser.switch_to.window(first)
    # A status that is no success is logged, too, and meant; everything else is a fault of the page.
    assert [text for text in wrong if "Failed to load resource" not in text] == []


@pytest.fixture
def scripted():
    script = Scripted()
    with running(script.app) as script.url:
        yield script


@pytest.fixture(scope="module")
def llm():
    sizes = {"max_num_seqs": 2, "max_model_len": 512, "max_num_batched_tokens": 512}
    with quick_start(), LLM(DEMO_MODEL, **sizes) as llm:
        yield llm


# --- with the engine ---


def test_an_answer_is_the_engines_and_tells_its_speed(open_page, llm):
    params = SamplingParams(temperature=0, max_tokens=100)
    [expected] = llm.chat([{"role": "user", "content": STORY}], params, use_tqdm=False)
    with serving(llm) as url:
        page = open_page(url)
        page.until(lambda: page.find("h1").text == "demo")
        page.find("summary").click()
        page.find("[name=temperature]").send_keys("0")
        page.find("[name=max_tokens]").send_keys("100")
        page.ask(STORY)
        assert page.answers() == [expected["text"]]
        note = page.find(".note").text
        count = len(expected["token_ids"])
        speed = rf"{count} tokens, first after \d+ ms, then [\d.]+ tokens/s"
        assert re.fullmatch(rf"{speed}(; cut off: .*)?", note)
        assert re.fullmatch(r"\d+ of 512 tokens", page.find("#context").text)
        page.run("setText('word '.repeat(600))")
        page.ask("!")
        assert "512" in page.find("article.error").text  # the server says why it is too long


def test_the_key_is_asked_for_and_forgotten_with_the_tab(open_page, llm):
    with serving(llm, api_key="secret") as url:
        page = open_page(url)
        for key, words in (("wrong", "asks for an API key"), ("secret", "does not accept")):
            page.until(lambda words=words: words in page.find("#why").text)
            page.find("#key").send_keys(key, Keys.ENTER)
        page.until(lambda: page.find("h1").text == "demo")
        page.ask(QUESTION)
        assert len(page.answers()) == 1
        assert "secret" in page.run("return JSON.stringify(sessionStorage)")
        assert page.run("return [localStorage.length, document.cookie]") == [0, ""]
        assert page.find("#key").get_property("value") == ""
        other = open_page(url)
        other.until(lambda: "asks for an API key" in other.find("#why").text)
        other.click("Cancel")
        other.say(QUESTION)
        other.until(lambda: other.find("#ask").get_property("open"))  # asks again
        other.find("#key").send_keys(Keys.ESCAPE)
        other.until(other.is_idle)
        assert "status 401" in other.find("article.error").text


# --- with a scripted server ---


def test_text_comes_as_it_is_written_and_can_be_stopped(open_page, scripted):
    scripted.replies, scripted.pause = [[{"content": f"word{i} "} for i in range(1000)]], 0.05
    page = open_page(scripted.url)
    page.say("Go on")
    page.until(lambda: "word3" in "".join(page.answers()))
    article = page.find("article.assistant")
    assert article.get_attribute("aria-busy") == "true" and page.find("#send").text == "Stop"
    page.find("#text").send_keys("not yet", Keys.ENTER)  # it waits in its field
    page.find("#text").send_keys(Keys.ESCAPE)
    page.until(page.is_idle)
    page.until(lambda: scripted.was_left)
    assert article.get_attribute("aria-busy") == "false"
    assert page.find(".note").text.endswith("; stopped")
    assert page.find("#text").get_property("value") == "not yet"
    scripted.replies = [[{"content": "Well."}]]
    page.find("#send").click()
    page.until(page.is_idle)
    said = [message["role"] for message in scripted.asked[-1]["messages"]]
    assert said == ["user", "assistant", "user"]  # what came before the stop counts


def test_a_conversation_goes_on_is_changed_and_is_left(open_page, scripted):
    scripted.replies = [[{"content": text}] for text in ("One.", "Two.", "Two again.", "Three.")]
    page = open_page(scripted.url)
    page.find("summary").click()
    page.find("#system").send_keys("Be short.")
    page.find("[name=top_k]").send_keys("5")
    page.find("#thinking").click()
    page.ask("first")
    page.ask("second")
    assert scripted.asked[1]["messages"] == [
        {"role": "system", "content": "Be short."}, {"role": "user", "content": "first"},
        {"role": "assistant", "content": "One."}, {"role": "user", "content": "second"},
    ]  # fmt: skip
    assert scripted.asked[1]["top_k"] == 5 and "top_p" not in scripted.asked[1]
    assert scripted.asked[1]["chat_template_kwargs"] == {"enable_thinking": False}
    page.click("Try again", "article:last-child")
    page.until(lambda: page.answers() == ["One.", "Two again."])
    assert scripted.asked[2]["messages"] == scripted.asked[1]["messages"]

    page.driver.refresh()
    assert page.answers() == ["One.", "Two again."]
    page.click("Edit", "article:nth-child(3)")
    assert page.answers() == ["One."] and page.find("#text").get_property("value") == "second"
    page.ask(", changed")
    assert scripted.asked[3]["messages"][-1]["content"] == "second, changed"
    page.click("New conversation")
    assert page.all("article") == []
    scripted.replies = [[{"content": "Hello."}]]
    page.ask("anew")
    assert scripted.asked[4]["messages"] == [{"role": "user", "content": "anew"}]


def test_a_conversation_that_is_left_gets_no_more(open_page, scripted):
    scripted.replies, scripted.pause = [[{"content": "late "}] * 1000], 0.02
    page = open_page(scripted.url)
    page.say("Go on")
    page.until(page.answers)
    page.click("New conversation")
    page.until(lambda: scripted.was_left)
    scripted.replies = [[{"content": "Hello."}]]
    page.ask("anew")
    assert page.answers() == ["Hello."] and len(scripted.asked[1]["messages"]) == 1


def test_thoughts_are_folded(open_page, scripted):
    thoughts = [{"reasoning_content": "Let me "}, {"reasoning_content": "see."}]
    scripted.replies = [[*thoughts, {"content": "Yes."}]]
    page = open_page(scripted.url)
    page.ask("Is it?")
    assert page.answers() == ["Yes."]
    fold = page.find("article details")
    assert not fold.get_property("open") and fold.text == "Thoughts"
    page.find("article summary").send_keys(Keys.ENTER)
    assert fold.text == "Thoughts\nLet me see."
    scripted.replies = [[{"content": "Sure."}]]
    page.ask("Sure?")  # thoughts are no part of what has been said
    assert scripted.asked[1]["messages"][1] == {"role": "assistant", "content": "Yes."}


EVIL = "<img src=x onerror='hacked=1'><script>hacked=1</script>"


def test_text_is_never_html(open_page, scripted):
    text = f"# {EVIL}\n- **{EVIL}** `{EVIL}`\n```\n{EVIL}\n```\n{EVIL} [a](javascript:hacked=1)"
    scripted.replies = [[{"content": c, "reasoning_content": c} for c in text], (400, EVIL, {})]
    page = open_page(scripted.url)
    page.ask(EVIL)
    page.ask(EVIL)
    assert page.all("main img, main script, main a") == []
    assert page.run("return typeof hacked") == "undefined"
    shown = page.find("main").text
    assert shown.count(EVIL) == 2 + 5 + 1  # two messages, five places of the answer, the error
    refused = page.run("try { document.body.innerHTML = '<b>'; } catch (e) { return e.name; }")
    assert refused == "TypeError"  # by the page's policy
    [entry] = page.driver.get_log("browser")[-1:]
    assert "TrustedHTML" in entry["message"]


def test_markdown_is_drawn(open_page, scripted):
    text = (
        "# Head\nSome *slanted*, **bold** and `code`.\n2 * 3 * 4\n\n3. three\n4. four\n\n"
        "```python\ndef f(*a):\n    pass\n```\nEnd"
    )
    scripted.replies = [[{"content": text}]]
    page = open_page(scripted.url)
    page.ask("Show")
    drawn = page.run("""return [...document.querySelector(".text:not(.user > *)").children]
        .map((e) => [e.localName, e.textContent])""")
    assert drawn == [
        ["h2", "Head"], ["p", "Some slanted, bold and code.\n2 * 3 * 4"], ["ol", "threefour"],
        ["pre", "def f(*a):\n    passCopy"], ["p", "End"],
    ]  # fmt: skip
    assert [e.text for e in page.all(".text :is(em, strong, p code)")] == [
        "slanted",
        "bold",
        "code",
    ]
    assert page.find("ol").get_attribute("start") == "3"


def test_what_fails_is_told_and_can_be_tried_again(open_page, scripted):
    page = open_page(scripted.url)
    half = {"content": "Half"}
    for reply, words, kept in (
        ((429, "8 wait", {"Retry-After": "3"}), ["busy", "in 3 s", "8 wait", "429"], []),
        ((500, "no memory", {}), ["has failed", "no memory", "500"], []),
        ((400, "top_k is wrong", {}), ["refuses", "top_k is wrong"], []),
        ([half, RuntimeError("no such device")], ["ended early", "no such device"], ["Half"]),
        ([half, None], ["connection", "lost"], ["Half"]),
    ):
        scripted.replies = [reply, [{"content": "All."}]]
        page.ask("Try")
        error = page.find("article.error")
        assert all(word in error.text for word in words), error.text
        assert error.get_attribute("role") == "alert" and page.answers() == kept
        page.click("Try again", "article.error")
        page.until(lambda: page.answers() == ["All."])
        assert page.all("article.error") == []
        assert [m["role"] for m in scripted.asked[-1]["messages"]] == ["user"]
        page.click("New conversation")


def test_a_server_that_is_gone_is_told_of(open_page):
    script = Scripted()
    with running(script.app) as url:
        page = open_page(url)
        page.until(lambda: page.find("h1").text == "scripted")
    page.ask("Anybody?")
    assert "cannot be reached" in page.find("article.error").text


def test_copying(open_page, scripted):
    scripted.replies = [[{"content": "Some **bold**\n```\ncode\n```"}]]
    page = open_page(scripted.url)
    permissions = {"permissions": ["clipboardReadWrite"], "origin": scripted.url}
    page.driver.execute_cdp_cmd("Browser.grantPermissions", permissions)
    page.ask("Show")
    read = "return navigator.clipboard.readText()"
    for within, text in (
        (".assistant > .actions", "Some **bold**\n```\ncode\n```"),
        ("pre", "code"),
    ):
        page.click("Copy", within)
        page.until(lambda text=text: page.run(read) == text)
    page.until(lambda: page.find("#status").get_property("textContent") == "Copied")


def test_a_phone_shows_all_without_scrolling_sideways(open_page, scripted):
    text = f"{'x' * 300}\n```\n{'code ' * 60}\n```\n- {'y' * 200}\n`{'z' * 200}`"
    scripted.replies = [[{"content": text, "reasoning_content": "w" * 200}]]
    page = open_page(scripted.url, PHONE)
    assert "Enter" not in page.find("main").text  # its keys are others
    page.find("#text").send_keys("u" * 300, Keys.ENTER, "v")  # a line break there
    page.click("Send")
    page.until(page.is_idle)
    assert scripted.asked[0]["messages"][0]["content"] == "u" * 300 + "\nv"
    page.find("article summary").click()
    page.find("footer summary").click()
    for element in ("document.documentElement", "document.querySelector('main')"):
        assert page.run(f"return {element}.scrollWidth - {element}.clientWidth") == 0
    assert page.run("return innerWidth") == 360
    for control in page.all("header button, footer button, summary"):
        assert control.size["height"] >= 44, control.text  # what a finger hits
    assert page.find("#text").is_displayed() and page.find("#send").is_displayed()


def test_everything_has_a_name_and_is_reached_by_the_keyboard(open_page, scripted):
    scripted.replies = [[{"content": "Yes.", "reasoning_content": "Hm."}]]
    page = open_page(scripted.url)
    page.ask("Is it?")
    page.find("footer summary").send_keys(Keys.ENTER)
    controls = page.all("button, input, textarea, summary")
    visible = [control for control in controls if control.is_displayed()]
    assert len(visible) >= 15
    assert [c.get_attribute("outerHTML") for c in visible if not c.accessible_name] == []
    reached = set()
    page.run("document.activeElement.blur()")
    for _ in range(len(visible) + 5):
        page.driver.switch_to.active_element.send_keys(Keys.TAB)
        focused = page.driver.switch_to.active_element
        reached.add(focused.id)
        if focused.tag_name == "button":
            assert focused.value_of_css_property("outline-style") == "solid"
    assert {control.id for control in visible} <= reached
    assert page.find("main").aria_role == "log" and page.find("#status").aria_role == "status"
