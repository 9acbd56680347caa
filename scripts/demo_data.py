"""Makes the demo model's training data: tasks whose answers can be checked, stories, small talk.

Everything is drawn from a seed, in plain Python; the phrasings are in demo_data.toml. A document is
a raw text or a conversation, and `document` draws one at random. Training never sees what the
evaluation asks: a tenth of all additions and lists, chosen by a hash (`is_held_out`,
`is_held_out_list`), is left out in every phrasing.
"""

import hashlib
import random
import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts import stories
from scripts.stories import Subject

EOS = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = (EOS, TURN_START, TURN_END)

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- endif %}"
)


def _lines(block: str) -> tuple[str, ...]:
    return tuple(block.strip().split("\n"))


_DATA = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
_LINES = {name: _lines(block) for name, block in _DATA["lines"].items()}
WORDS = tuple(_DATA["words"].split())  # the words that lists are made of


@dataclass(frozen=True)
class Turn:
    """One exchange of a conversation."""

    question: str
    answer: str
    checked: bool = True  # whether there is one right answer


def chat_prompt(question: str, system: str | None = None) -> str:
    """Writes one user message as CHAT_TEMPLATE does, up to the point where the answer begins."""
    head = f"{TURN_START}system\n{system}{TURN_END}\n" if system else ""
    return f"{head}{TURN_START}user\n{question}{TURN_END}\n{TURN_START}assistant\n"


# ---- held out -------------------------------------------------------------------------------


def _in_held_out_tenth(key: str) -> bool:
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % 10 == 0


def is_held_out(a: int, b: int) -> bool:
    """Tells whether a + b (and so b + a) is kept for the evaluation.

    One-digit sums never are: they are the addition table, which is learnt by heart.
    """
    if a < 10 and b < 10:
        return False
    return _in_held_out_tenth(f"{min(a, b)}+{max(a, b)}")


def is_held_out_list(items: Sequence[str]) -> bool:
    """Tells whether lists of these items, in any order, are kept for the evaluation."""
    return _in_held_out_tenth(" ".join(sorted(items)))


# ---- addition -------------------------------------------------------------------------------

MAIN_ADDITION = "What is {a} + {b}?"


def _draw_addends(rng: random.Random) -> tuple[int, int]:
    """Draws two numbers of up to three digits.

    Most are uniform; a fifth have a uniform number of digits, a fifth many carries.
    """
    kind = rng.random()
    if kind < 0.6:
        return rng.randrange(1000), rng.randrange(1000)
    if kind < 0.8:
        return rng.randrange(10 ** rng.randint(1, 3)), rng.randrange(10 ** rng.randint(1, 3))
    a = b = 0
    for _ in range(3):  # each column sums to 8..11, so that carries run through
        total = rng.randint(8, 11)
        digit = rng.randint(total - 9 if total > 9 else 0, min(total, 9))
        a, b = 10 * a + digit, 10 * b + total - digit
    return a, b


def addition(rng: random.Random, *, held_out: bool = False, main: bool = False) -> Turn:
    """Asks for the sum of two numbers of up to three digits; `main` asks in MAIN_ADDITION."""
    while True:
        a, b = _draw_addends(rng)
        if is_held_out(a, b) == held_out:
            break
    ask = MAIN_ADDITION if main or rng.random() < 0.35 else rng.choice(_LINES["additions"])
    return Turn(ask.format(a=a, b=b), str(a + b))


def unseen_additions(count: int, seed: int) -> list[Turn]:
    """Draws distinct held-out additions in MAIN_ADDITION, both numbers uniform in 0..999."""
    rng, found = random.Random(seed), {}
    while len(found) < count:
        a, b = rng.randrange(1000), rng.randrange(1000)
        if is_held_out(a, b):
            found[a, b] = Turn(MAIN_ADDITION.format(a=a, b=b), str(a + b))
    return list(found.values())


# ---- lists: sort, copy, reverse, count ------------------------------------------------------

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _draw_items(rng: random.Random, low: int, high: int, *, numbers: bool | None, held_out: bool):
    """Draws a list of numbers (below 100, some below 1000) or of distinct words; None is either."""
    while True:
        n = rng.randint(low, high)
        as_numbers = rng.random() < 0.5 if numbers is None else numbers
        if as_numbers:
            limit = rng.choice((10, 100, 100, 100, 1000))
            items = [str(rng.randrange(limit)) for _ in range(n)]
        else:
            items = rng.sample(WORDS, n)
        if is_held_out_list(items) == held_out:
            return items


def _ask(rng: random.Random, phrasings: str, items: Sequence[str], main: bool) -> tuple[str, str]:
    """Returns a question about the items, and the items as the question writes them.

    The main question is the first phrasing, with commas between the items.
    """
    lines = _LINES[phrasings]
    phrasing = lines[0] if main or rng.random() < 0.3 else rng.choice(lines)
    listed = (", " if main or rng.random() < 0.6 else " ").join(items)
    return phrasing.format(items=listed), listed


def sort_numbers(rng: random.Random, *, held_out: bool = False, main: bool = False) -> Turn:
    """Asks to sort three to eight numbers, mostly from small to large."""
    items = _draw_items(rng, 3, 8, numbers=True, held_out=held_out)
    down = not main and rng.random() < 0.2
    answer = sorted(items, key=int, reverse=down)
    question, _ = _ask(rng, "sort_down" if down else "sort_up", items, main)
    return Turn(question, ", ".join(answer))


def sort_words(rng: random.Random, *, held_out: bool = False, main: bool = False) -> Turn:
    """Asks to sort three to eight distinct words of WORDS alphabetically."""
    items = _draw_items(rng, 3, 8, numbers=False, held_out=held_out)
    return Turn(_ask(rng, "sort_words", items, main)[0], ", ".join(sorted(items)))


def copy(rng: random.Random, *, held_out: bool = False, main: bool = False) -> Turn:
    """Asks to repeat words, numbers or strings of random letters, character for character."""
    if rng.random() < 0.5:
        items = _draw_items(rng, 2, 8, numbers=None, held_out=held_out)
    else:
        while True:
            n = rng.randint(1, 4)
            items = ["".join(rng.choices(LETTERS, k=rng.randint(2, 8))) for _ in range(n)]
            if is_held_out_list(items) == held_out:
                break
    return Turn(*_ask(rng, "copy", items, main))


def reverse(rng: random.Random, *, held_out: bool = False, main: bool = False) -> Turn:
    """Asks to write two to six words or numbers backwards."""
    items = _draw_items(rng, 2, 6, numbers=None, held_out=held_out)
    return Turn(_ask(rng, "reverse", items, main)[0], ", ".join(reversed(items)))


def count(rng: random.Random, *, held_out: bool = False, main: bool = False) -> Turn:
    """Asks how many words there are, or to count from one number to another."""
    if not main and rng.random() < 0.4:
        start, steps = rng.randrange(90), rng.randint(2, 12)
        end = start + steps
        if rng.random() < 0.25:
            answer = range(end, start - 1, -1)
            question = f"Count down from {end} to {start}."
        else:
            answer = range(start, end + 1)
            question = f"Count from {start} to {end}."
        return Turn(question, ", ".join(map(str, answer)))
    items = _draw_items(rng, 1, 10, numbers=False, held_out=held_out)
    return Turn(_ask(rng, "count", items, main)[0], str(len(items)))


def small_question(rng: random.Random) -> Turn:
    """Asks for the larger or smaller number, the next or previous one, or a spelling."""
    a, b = rng.sample(range(10 ** rng.randint(1, 3)), 2)
    word = rng.choice(WORDS)
    options = (
        (f"Which number is larger, {a} or {b}?", str(max(a, b))),
        (f"Which is larger, {a} or {b}?", str(max(a, b))),
        (f"Which number is smaller, {a} or {b}?", str(min(a, b))),
        (f"What number comes after {a}?", str(a + 1)),
        (f"What number comes before {a + 1}?", str(a)),
        (f"Spell the word {word}.", "-".join(word)),
        (f"How do you spell {word}?", "-".join(word)),
    )
    return Turn(*rng.choice(options))


# ---- small talk -----------------------------------------------------------------------------

ABILITIES = "I can tell short stories, add numbers of up to three digits, and sort or copy lists."
NAME = "I am the nanovllm_jax demo model"
_SMALL_TALK = [(_lines(talk["questions"]), _lines(talk["answers"])) for talk in _DATA["small_talk"]]


def small_talk(rng: random.Random) -> Turn:
    """Greets, tells about the model, or politely refuses what the model cannot do."""
    kind = rng.random()
    if kind < 0.25:
        question, refusal = rng.choice(_LINES["beyond"]), rng.choice(_LINES["refusals"])
        return Turn(question, f"{refusal} {ABILITIES}", checked=False)
    if kind < 0.4:
        a, b = rng.randrange(10 ** rng.randint(1, 3)), rng.randrange(10 ** rng.randint(1, 3))
        question = rng.choice(_LINES["beyond_arithmetic"]).format(a=a, b=b)
        return Turn(question, "I am sorry, I have only learned to add.", checked=False)
    questions, answers = rng.choice(_SMALL_TALK)
    question, answer = rng.choice(questions), rng.choice(answers)
    return Turn(question, answer.format(name=NAME, abilities=ABILITIES), checked=False)


# ---- stories


def story_request(hero: str, item: str) -> str:
    """Asks for a story about a hero and an object in the main phrasing."""
    return stories.with_articles(f"Tell me a story about a~{hero} and a~{item}.")


def asked_story(rng: random.Random) -> Turn:
    """Asks for a story, and tells one about what was asked."""
    hero, friend = rng.sample(stories.KINDS, 2)
    item = rng.choice(tuple(stories.OBJECTS))
    name = rng.choice(stories.GIRLS + stories.BOYS)
    theme = rng.choice(stories.THEMES)
    named = "fox" if hero in (stories.MEN if name in stories.GIRLS else stories.WOMEN) else hero
    subject, about = rng.choices(
        (
            (Subject(hero=hero, item=item), f"a~{hero} and a~{item}"),
            (Subject(hero=hero), f"a~{hero}"),
            (Subject(item=item), f"a~{item}"),
            (Subject(hero=hero, friend=friend), f"a~{hero} and a~{friend}"),
            (Subject(hero=named, name=name), f"a~{named} named {name}"),
            (Subject(hero=hero, theme=theme), f"a~{hero} and {theme}"),
            (Subject(theme=theme), theme),
            (Subject(), ""),
        ),
        (8, 4, 3, 2, 2, 1, 1, 3),
    )[0]
    request = rng.choice(_LINES["story_requests" if about else "any_story"]).format(x=about)
    return Turn(stories.with_articles(request), stories.story(rng, subject), checked=False)


# ---- documents ------------------------------------------------------------------------------

TASKS: dict[str, Callable[..., Turn]] = {
    "addition": addition,
    "sort_numbers": sort_numbers,
    "sort_words": sort_words,
    "copy": copy,
    "reverse": reverse,
    "count": count,
}
# Shares of the conversations' turns. A story has about as many tokens as forty additions.
CHAT_MIXTURE: dict[Callable[..., Turn], float] = {
    addition: 70,
    asked_story: 5,
    sort_numbers: 5,
    sort_words: 4,
    copy: 5,
    reverse: 3,
    count: 2.5,
    small_question: 2,
    small_talk: 3.5,
}
RAW_STORIES, RAW_ADDITIONS = 0.04, 0.05  # shares of the documents

# How the model learns a piece of a document: not at all (a question), or to write it.
READ, TOLD, CHECKED = 0, 1, 2
Document = list[tuple[str, int]]


def document(rng: random.Random) -> Document:
    """Draws one training document: a story, an addition to complete, or a conversation."""
    kind = rng.random()
    if kind < RAW_STORIES:
        return [(stories.story(rng) + EOS, TOLD)]
    if kind < RAW_STORIES + RAW_ADDITIONS:
        turn = addition(rng)
        a, b = re.findall(r"\d+", turn.question)
        question = rng.choice(_LINES["raw_additions"]).format(a=a, b=b)
        return [(question, READ), (f" {turn.answer}{EOS}", CHECKED)]
    turns = 1 if rng.random() < 0.92 else rng.randint(2, 4)
    makers = rng.choices(tuple(CHAT_MIXTURE), tuple(CHAT_MIXTURE.values()), k=turns)
    system = rng.choice(_LINES["system_prompts"]) if rng.random() < 0.05 else None
    return conversation([make(rng) for make in makers], system)


def conversation(turns: Sequence[Turn], system: str | None = None) -> Document:
    """Writes a conversation as the chat template does; the model learns the answers only."""
    pieces: Document = []
    for i, turn in enumerate(turns):
        gap = "\n" if i else ""
        pieces.append((gap + chat_prompt(turn.question, None if i else system), READ))
        pieces.append((turn.answer + TURN_END, CHECKED if turn.checked else TOLD))
    return pieces


def evaluation_set(task: str, size: int, seed: int) -> list[Turn]:
    """Draws `size` held-out questions of a task of TASKS, in its main phrasing."""
    if task == "addition":
        return unseen_additions(size, seed)
    rng = random.Random(seed)
    return [TASKS[task](rng, held_out=True, main=True) for _ in range(size)]
