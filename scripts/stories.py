"""Tells children's stories from a grammar, whose text is in stories.toml.

A plot is a list of beats; a beat offers several sentences, of which one is told. Names, places and
objects are drawn to fit each other.
"""

import random
import re
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path

_DATA = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
_WORDS = {name: tuple(text.split()) for name, text in _DATA["words"].items()}
_LINES: dict[str, tuple[str, ...]] = {}


def _lines(block: str) -> tuple[str, ...]:
    lines: list[str] = []
    for line in block.strip().split("\n"):
        if line.startswith("@"):
            lines += _LINES[line.removeprefix("@")]
        else:
            lines.append("" if line == "-" else line.replace("{one_day}", _DATA["one_day"]))
    return tuple(lines)


for _name, _block in _DATA["lines"].items():
    _LINES[_name] = _lines(_block)

# ---- who and what ---------------------------------------------------------------------------

GIRLS, BOYS = _WORDS["girls"], _WORDS["boys"]
WOMEN, MEN = _WORDS["women"], _WORDS["men"]
KINDS = _WORDS["animals"] + WOMEN + MEN + _WORDS["workers"]

_MATERIALS = _DATA["materials"]
OBJECTS: dict[str, str] = {  # the material of each object
    noun: name for name, material in _MATERIALS.items() for noun in material["objects"].split()
}


@dataclass(frozen=True)
class Subject:
    """What a story is asked to be about; None leaves it open."""

    hero: str | None = None
    item: str | None = None
    friend: str | None = None
    name: str | None = None
    theme: str | None = None


def _is_female(kind: str, rng: random.Random) -> bool:
    if kind in WOMEN or kind in ("hen", "cow"):
        return True
    return kind not in MEN and rng.random() < 0.5


def _pronouns(female: bool, prefix: str) -> dict[str, str]:
    he, him, his = ("she", "her", "her") if female else ("he", "him", "his")
    return {f"{prefix}he": he, f"{prefix}him": him, f"{prefix}his": his}


def _adjective(rng: random.Random, kind: str, without: str) -> str:
    """Draws an adjective for such a person or animal that does not occur in `without`."""
    young = kind in _WORDS["animals"] + _WORDS["children"]
    adjectives = _WORDS["young" if young else "grown"]
    return rng.choice([word for word in adjectives if word not in without])


def _cast(rng: random.Random, subject: Subject, item: str) -> dict[str, str]:
    """Draws what fills the slots of a story's sentences."""
    hero = subject.hero or rng.choice(KINDS)
    friend = subject.friend or rng.choice(KINDS)
    while friend == hero and not subject.friend:
        friend = rng.choice(KINDS)
    female = subject.name in GIRLS if subject.name else _is_female(hero, rng)
    # The friend is mostly of the other sex, so that pronouns stay clear.
    friend_female = _is_female(friend, rng)
    if friend_female == female and friend not in (*WOMEN, *MEN, "hen", "cow"):
        friend_female = rng.random() < 0.2 if female else rng.random() >= 0.2
    name = subject.name or rng.choice(GIRLS if female else BOYS)
    home = rng.choice(_LINES["castles" if hero in _WORDS["royals"] else "homes"])
    adjective = _adjective(rng, hero, without=home)
    friend_adjective = _adjective(rng, friend, without=adjective)
    friend_name = name
    while friend_name == name:
        friend_name = rng.choice(GIRLS if friend_female else BOYS)
    material = _MATERIALS[OBJECTS[item]]
    cast = {
        "N": name,
        "k": hero,
        "adj": adjective,
        "F": friend_name,
        "fk": friend,
        "fadj": friend_adjective,
        "o": item,
        "harm": material.get("harm", ""),
        "mend": material.get("mend", ""),
        "home": home,
        **{f"spot{i}": spot for i, spot in enumerate(rng.sample(_LINES["spots"], 3), 1)},
        "oa": rng.choice(material["adjectives"].split()),
        "skill": rng.choice(_LINES["skills"]),
        "play": _DATA["sounds"].get(item, "played it"),
        "hers": "hers" if female else "his",
        **_pronouns(female, ""),
        **_pronouns(friend_female, "f"),
    }
    return cast | {_capital(slot): _capital(text) for slot, text in cast.items()}


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# ---- plots ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plot:
    """What a kind of story tells, beat by beat; each beat is one of several sentences."""

    theme: str
    beats: tuple[tuple[str, ...], ...]
    objects: tuple[str, ...]  # what such a story can be about
    grounded: bool  # the friend must not be able to fly


def _objects_of_kind(kind: str) -> tuple[str, ...]:
    """Returns the objects of a kind, or those that are listed in its place."""
    food, bulky = _MATERIALS["food"]["objects"].split(), _WORDS["bulky"]
    kinds = {
        "any": list(OBJECTS),
        "food": food,
        "not food": [noun for noun in OBJECTS if noun not in food],
        "handy": [noun for noun in OBJECTS if noun not in food and noun not in bulky],
        "mendable": [noun for noun in OBJECTS if "mend" in _MATERIALS[OBJECTS[noun]]],
    }
    return tuple(kinds.get(kind) or kind.split())


PLOTS = tuple(
    Plot(
        plot["theme"],
        tuple(_lines(block) for block in plot["beats"].strip().split("\n\n")),
        _objects_of_kind(plot["objects"]),
        plot.get("grounded", False),
    )
    for plot in _DATA["plots"]
)
THEMES = tuple(dict.fromkeys(plot.theme for plot in PLOTS))
_WEIGHTS, _OPENINGS = zip(*(line.split(" ", 1) for line in _LINES["openings"]), strict=True)

# ---- telling --------------------------------------------------------------------------------

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_ARTICLE = re.compile(r"\b([Aa])~(\w)")


def with_articles(text: str) -> str:
    """Turns "a~owl" into "an owl"; here only "uni" begins with a vowel and no vowel's sound."""

    def article(match: re.Match) -> str:
        vowel = match[2] in "aeio" or (match[2] == "u" and text[match.start(2) :][:3] != "uni")
        return f"{match[1]}{'n' if vowel else ''} {match[2]}"

    return _ARTICLE.sub(article, text)


def _say(rng: random.Random, sentence: str, cast: dict[str, str]) -> str:
    chosen = _CHOICE.sub(lambda match: rng.choice(match[1].split("|")), sentence)
    return with_articles(chosen.format_map(cast))


def _plots_about(subject: Subject) -> list[Plot]:
    return [
        plot
        for plot in PLOTS
        if (subject.theme is None or plot.theme == subject.theme)
        and (subject.item is None or subject.item in plot.objects)
    ]


def story(rng: random.Random, subject: Subject | None = None) -> str:
    """Tells a story of some 60 to 200 words with a beginning, a middle and an end."""
    subject = subject or Subject()
    plot = rng.choice(_plots_about(subject))
    item = subject.item or rng.choice(plot.objects)
    if plot.grounded and not subject.friend:
        without = (*_WORDS["flyers"], subject.hero)
        subject = replace(subject, friend=rng.choice([k for k in KINDS if k not in without]))
    cast = _cast(rng, subject, item)
    paragraphs = rng.random() < 0.5
    text = _say(rng, rng.choices(_OPENINGS, [int(weight) for weight in _WEIGHTS])[0], cast)
    for beat in (_LINES["traits"], *plot.beats, _LINES["the_end"]):
        sentence = _say(rng, rng.choice(beat), cast)
        if sentence:
            gap = "\n\n" if paragraphs and sentence.startswith("¶") else " "
            text += gap + sentence.removeprefix("¶")
    return text


def words_of(text: str) -> list[str]:
    """Returns the words of a text in lower case, without punctuation."""
    return re.findall(r"[a-z]+", text.lower())


def story_words(seed: int = 0, stories: int = 3000) -> set[str]:
    """Collects the words of `stories` stories in lower case: very nearly all that there are."""
    rng = random.Random(seed)
    return {word for _ in range(stories) for word in words_of(story(rng))}
