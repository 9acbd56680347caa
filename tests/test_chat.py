"""`nanovllm-jax chat`: what goes into the template, what is shown, and what is remembered."""

import io
import json
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise

import pytest
from helpers import FakeRunner, byte_tokenizer

import nanovllm_jax
from nanovllm_jax.cli import main
from nanovllm_jax.tools import chat
from nanovllm_jax.tools.chat import without_thoughts

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"


class Scripted(FakeRunner):
    """A device that answers with texts, one after another, and then with an end token."""

    answers, prompts = (), ()
    tokenizer = byte_tokenizer(257)

    def __init__(self, config):
        super().__init__(config)
        self.left = []

    def dispatch(self, batch):
        if batch.is_prefill and batch.starts[0] == 0:
            Scripted.prompts.append(self.tokenizer.decode(batch.seqs[0].token_ids))
            self.left = self.tokenizer.encode(Scripted.answers.pop(0)) + [0] * 9
        future = super().dispatch(batch)
        future.tokens = [[self.left.pop(0)] for _ in future.tokens]
        return future


@pytest.fixture
def talk(checkpoint, monkeypatch, capsys, tmp_path):
    """Give a function that says lines to a model, and returns what it prints and was given."""
    from nanovllm_jax.engine import core

    monkeypatch.setattr(core, "ModelRunner", Scripted)

    def run(lines, answers, *argv, template=TEMPLATE, config=None):
        path = tmp_path / "model"
        byte_tokenizer(257).save_pretrained(path)
        (path / "chat_template.jinja").write_text(template, "utf-8")
        source = checkpoint(vocab_size=257) / "config.json"
        (path / "config.json").write_text(source.read_text("utf-8"), "utf-8")
        if config:
            (path / "generation_config.json").write_text(json.dumps(config), "utf-8")
        Scripted.answers, Scripted.prompts = list(answers), []
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        status = main(["chat", "--model", str(path), "--num-kvcache-blocks", "8", *argv])
        captured = capsys.readouterr()
        return status, captured.out, captured.err, Scripted.prompts

    return run


def test_a_conversation_remembers_what_was_said(talk):
    status, out, _, prompts = talk(["hi", "", "and you?"], ["hello.", "fine."])
    assert (status, out) == (0, "hello.\nfine.\n")
    assert prompts == [
        "[user]hi[assistant]",
        "[user]hi[assistant]hello.[user]and you?[assistant]",
    ]


def test_reset_forgets_all_but_the_system_prompt(talk):
    argv = ["--system", "Be brief."]
    _, _, _, prompts = talk(["hi", "/reset", "again", "/exit", "never"], ["a", "b"], *argv)
    assert prompts == [
        "[system]Be brief.[user]hi[assistant]",
        "[system]Be brief.[user]again[assistant]",
    ]


def test_a_slash_that_is_no_command_shows_the_commands(talk):
    _, out, err, prompts = talk(["/rest", " /etc"], ["yes"])
    assert "/reset" in err and out == "yes\n" and prompts == ["[user]/etc[assistant]"]


THOUGHT = "<think>\nwell, 1 < 2\n</think>\n\nyes"


def test_thoughts_are_shown_and_not_remembered(talk):
    _, out, _, prompts = talk(["is it?", "sure?"], [THOUGHT, "sure"])
    assert out == THOUGHT + "\nsure\n"
    assert prompts[1] == "[user]is it?[assistant]yes[user]sure?[assistant]"


def test_thoughts_are_hidden_if_asked(talk):
    _, out, _, prompts = talk(["is it?", "sure?"], [THOUGHT, "<b> sure"], "--hide-thinking")
    assert out == "yes\n<b> sure\n"
    assert prompts[1] == "[user]is it?[assistant]yes[user]sure?[assistant]"


def test_a_template_may_begin_the_thoughts(talk):
    template = TEMPLATE + "<think>"
    answers = ["\nwell\n</think>\n\nyes", "no\n</think>sure"]
    _, out, _, prompts = talk(["a", "b"], answers, "--hide-thinking", template=template)
    assert out == "yes\nsure\n"
    assert prompts[1] == "[user]a[assistant]yes[user]b[assistant]<think>"


def test_no_think_reaches_the_template(talk):
    template = TEMPLATE + "{{ enable_thinking }}"
    assert talk(["a"], ["b"], "--no-think", template=template)[3] == ["[user]a[assistant]False"]


@pytest.mark.parametrize("text", [THOUGHT, "  <think>a</think>b", "<b>", "no", "<think", "", "\n"])
def test_more_of_an_answer_never_shows_less(text):
    shown = [without_thoughts(text[:end]) for end in range(len(text) + 1)]
    assert all(later.startswith(one) for one, later in pairwise(shown))


def test_an_answer_goes_on_as_long_as_there_is_room(talk):
    argv = ["--max-model-len", "400"]
    _, out, err, _ = talk(["hi"], ["x" * 300], *argv)
    assert out == 300 * "x" + "\n" and not err
    _, out, err, _ = talk(["hi"], ["x" * 500], *argv)
    assert out == (400 - 19) * "x" + "\n"
    assert "cut off after 381 tokens; --max-model-len allows no more" in err
    _, out, err, _ = talk(["hi"], ["x" * 500], "--max-tokens", "7")
    assert out == 7 * "x" + "\n" and "cut off after 7 tokens; --max-tokens allows" in err
    _, out, _, _ = talk(["hi"], ["x" * 500], config={"max_new_tokens": 9})
    assert out == 9 * "x" + "\n"


def test_a_message_that_does_not_fit_is_refused_and_forgotten(talk):
    status, out, err, prompts = talk(["y" * 300, "hi"], ["yes"], "--max-model-len", "256")
    assert status == 0 and out == "yes\n" and prompts == ["[user]hi[assistant]"]
    assert "the prompt has 317 tokens" in err and "(/reset begins anew)" in err


def test_stop_strings_end_an_answer(talk):
    assert talk(["hi"], ["one. two. three."], "--stop", ". ")[1] == "one\n"


def test_an_interruption_ends_the_answer_and_not_the_conversation(talk, monkeypatch):
    step, calls = nanovllm_jax.LLM.step_outputs, []

    def interrupted(llm):
        calls.append(llm)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(llm)

    monkeypatch.setattr(nanovllm_jax.LLM, "step_outputs", interrupted)
    status, out, err, prompts = talk(["hi", "go on"], ["hello there.", "fine."])
    assert status == 0 and out == "hel\nfine.\n" and "interrupted" in err
    assert prompts[1] == "[user]hi[assistant]hel[user]go on[assistant]"


PROCESS = """
import sys
from nanovllm_jax import __main__ as process
process.PATIENCE_S = 0.3
sys.argv[1:] = ["chat", "--num-kvcache-blocks", "4", "--max-model-len", "256", "--ignore-eos"]
sys.argv += ["--enforce-eager"]
process.entry()
"""


def test_the_process_survives_an_interrupted_answer():
    """It ends itself some time after an interruption that does not end it."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    pipes = dict.fromkeys(["stdin", "stdout", "stderr"], subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", PROCESS], **pipes) as process:
        signal.signal(signal.SIGINT, inherited)
        watchdog = threading.Timer(120, process.kill)
        watchdog.start()
        process.stdin.write(b"Tell me a story.\n")
        process.stdin.flush()
        assert process.stdout.read(5) == b"Once ", process.stderr.read()
        process.send_signal(signal.SIGINT)
        rest = process.stdout.readline()
        time.sleep(1)
        out, err = process.communicate(b"What is 345 + 678?\n")
        watchdog.cancel()
    assert process.returncode == 0, err
    assert len(rest) < 500 and out.startswith(b"1023") and err.count(b"interrupted") == 1


@pytest.mark.parametrize(
    ("argv", "said"),
    [(["--temperature", "-1"], "temperature"), (["--nope"], "--nope"), (["hi"], "hi"),
     (["--top-k", "3"], "--top-k does nothing")],
)  # fmt: skip
def test_bad_usage_is_one_line_and_status_2(argv, said, capsys, monkeypatch):
    monkeypatch.setattr(nanovllm_jax, "LLM", lambda *_, **__: pytest.fail("an engine was made"))
    assert main(["chat", *argv]) == 2
    assert said in capsys.readouterr().err


def test_a_model_without_a_template_is_refused(checkpoint, capsys):
    assert main(["chat", "--model", str(checkpoint())]) == 2
    assert "has no chat template" in capsys.readouterr().err


def test_the_demo_model_talks(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is 345 + 678?\n"))
    argv = ["chat", "--num-kvcache-blocks", "4", "--max-model-len", "256", "--enforce-eager"]
    assert main(argv) == 0
    assert capsys.readouterr().out == "1023\n"


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit):
        chat.parse(["--help"])
    assert "/reset" in capsys.readouterr().out
