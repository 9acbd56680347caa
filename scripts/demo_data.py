"""The demo model's training data: stories from a grammar, and tasks whose answers can be checked.

Everything is made here from a seed, in plain Python. A document is either a raw text or a
conversation; `document` draws one at random. What the evaluation asks is never trained on: items
whose hash falls into one tenth (`is_held_out`) are left out in every phrasing.
"""

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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


@dataclass(frozen=True)
class Turn:
    """One exchange of a conversation."""

    question: str
    answer: str
    checked: bool = True  # whether there is one right answer


def chat_prompt(question: str, system: str | None = None) -> str:
    """What CHAT_TEMPLATE makes of one user message, up to where the answer begins."""
    head = f"{TURN_START}system\n{system}{TURN_END}\n" if system else ""
    return f"{head}{TURN_START}user\n{question}{TURN_END}\n{TURN_START}assistant\n"


# ---- held out -------------------------------------------------------------------------------


def _in_held_out_tenth(key: str) -> bool:
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % 10 == 0


def is_held_out(a: int, b: int) -> bool:
    """Whether a + b (and so b + a) is kept for the evaluation.

    One-digit sums never are: they are the addition table, which is learnt by heart.
    """
    if a < 10 and b < 10:
        return False
    return _in_held_out_tenth(f"{min(a, b)}+{max(a, b)}")


def is_held_out_list(items: Sequence[str]) -> bool:
    """Whether lists of these items, in any order, are kept for the evaluation."""
    return _in_held_out_tenth(" ".join(sorted(items)))


# ---- addition -------------------------------------------------------------------------------

MAIN_ADDITION = "What is {a} + {b}?"
ADDITIONS = (
    "{a} + {b} =",
    "{a} + {b}",
    "{a}+{b}",
    "{a}+{b}=",
    "{a} plus {b}",
    "What's {a} + {b}?",
    "Add {a} and {b}.",
    "Can you add {a} and {b}?",
    "What is {a} plus {b}?",
    "what is {a} + {b}",
    "what is {a}+{b}?",
    "Calculate {a} + {b}.",
    "Compute {a} + {b}",
    "How much is {a} + {b}?",
    "What do you get if you add {a} and {b}?",
    "What is the sum of {a} and {b}?",
    "Please add {a} to {b}.",
)
RAW_ADDITIONS = ("{a} + {b} =", "{a}+{b} =", MAIN_ADDITION, "The sum of {a} and {b} is")


def _draw_addends(rng: random.Random) -> tuple[int, int]:
    """Up to three digits each: mostly uniform; some by length, some with many carries."""
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
    """An addition of numbers of up to three digits; `main` asks in the main phrasing."""
    while True:
        a, b = _draw_addends(rng)
        if is_held_out(a, b) == held_out:
            break
    ask = MAIN_ADDITION if main or rng.random() < 0.35 else rng.choice(ADDITIONS)
    return Turn(ask.format(a=a, b=b), str(a + b))


def unseen_additions(count: int, seed: int) -> list[Turn]:
    """Distinct held-out additions in the main phrasing, both numbers uniform in 0..999."""
    rng, found = random.Random(seed), {}
    while len(found) < count:
        a, b = rng.randrange(1000), rng.randrange(1000)
        if is_held_out(a, b):
            found[a, b] = Turn(MAIN_ADDITION.format(a=a, b=b), str(a + b))
    return list(found.values())


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# ---- lists: sort, copy, reverse, count ------------------------------------------------------

WORDS = _words(
    """apple acorn ant arrow autumn baker ball basket bear bell bird blue boat book bread bridge
    brown brush butter cake candle castle cat chair cheese clock cloud coat cow crown cup dance
    dog door dragon drum duck eagle egg evening farm feather field fire fish flag flower forest
    fox frog garden gate giant goat gold grape grass green hammer hat hen hill honey horse house
    ice ink iron island ivy jam jar juice jungle key king kite knife ladder lake lamp leaf lemon
    lion map meadow milk mirror moon morning mouse needle nest night nut ocean onion orange owl
    paper pear pencil pie pig pillow plum pond queen quiet quilt rabbit rain red ring river road
    robin rope rose salt sand scarf school sea seed sheep shell ship shoe silver sky sleep snow
    soap song soup spoon spring star stone summer sun swan table tiger top train tree turtle
    umbrella under valley vase village violin wagon wall water wheel white wind window winter
    wolf wood yard yarn yellow young zebra"""
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _draw_items(rng: random.Random, low: int, high: int, *, numbers: bool | None, held_out: bool):
    """A list of numbers (below 100, or some below 1000) or of distinct words; None: either."""
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


SORT_UP = (
    "Sort these numbers: {items}",
    "Sort: {items}",
    "Sort {items}",
    "Sort the numbers {items}.",
    "sort these numbers: {items}",
    "Put these numbers in order: {items}",
    "Sort these numbers from smallest to largest: {items}",
    "Sort in ascending order: {items}",
    "Please sort these numbers: {items}",
)
SORT_DOWN = (
    "Sort these numbers from largest to smallest: {items}",
    "Sort in descending order: {items}",
)
SORT_WORDS = (
    "Sort these words: {items}",
    "Sort: {items}",
    "Sort the words {items}.",
    "sort these words: {items}",
    "Put these words in alphabetical order: {items}",
    "Sort these words alphabetically: {items}",
)
COPY = (
    "Repeat after me: {items}",
    "Copy this: {items}",
    "Copy: {items}",
    "Say: {items}",
    "Repeat: {items}",
    "Repeat this exactly: {items}",
)
REVERSE = (
    "Reverse this list: {items}",
    "Reverse: {items}",
    "Say these backwards: {items}",
    "Write this list in reverse order: {items}",
)
COUNT = (
    "Count the words: {items}",
    "How many words are there: {items}",
    "How many words are in this list: {items}",
)


def _ask(
    rng: random.Random, phrasings: Sequence[str], items: Sequence[str], main: bool
) -> tuple[str, str]:
    """A question about the items, and the items as it writes them; the main one uses commas."""
    phrasing = phrasings[0] if main or rng.random() < 0.3 else rng.choice(phrasings)
    listed = (", " if main or rng.random() < 0.6 else " ").join(items)
    return phrasing.format(items=listed), listed


def sort_numbers(rng: random.Random, *, held_out: bool = False, main: bool = False) -> Turn:
    """Three to eight numbers, mostly ascending; the answer is separated by commas."""
    items = _draw_items(rng, 3, 8, numbers=True, held_out=held_out)
    down = not main and rng.random() < 0.2
    answer = sorted(items, key=int, reverse=down)
    question, _ = _ask(rng, SORT_DOWN if down else SORT_UP, items, main)
    return Turn(question, ", ".join(answer))


def sort_words(rng: random.Random, *, held_out: bool = False, main: bool = False) -> Turn:
    """Three to eight distinct words of WORDS, in alphabetical order."""
    items = _draw_items(rng, 3, 8, numbers=False, held_out=held_out)
    return Turn(_ask(rng, SORT_WORDS, items, main)[0], ", ".join(sorted(items)))


def copy(rng: random.Random, *, held_out: bool = False, main: bool = False) -> Turn:
    """Words, numbers or strings of random letters, word for word."""
    if rng.random() < 0.5:
        items = _draw_items(rng, 2, 8, numbers=None, held_out=held_out)
    else:
        while True:
            n = rng.randint(1, 4)
            items = ["".join(rng.choices(LETTERS, k=rng.randint(2, 8))) for _ in range(n)]
            if is_held_out_list(items) == held_out:
                break
    return Turn(*_ask(rng, COPY, items, main))


def reverse(rng: random.Random, *, held_out: bool = False, main: bool = False) -> Turn:
    """A list of two to six words or numbers, backwards, separated by commas."""
    items = _draw_items(rng, 2, 6, numbers=None, held_out=held_out)
    return Turn(_ask(rng, REVERSE, items, main)[0], ", ".join(reversed(items)))


def count(rng: random.Random, *, held_out: bool = False, main: bool = False) -> Turn:
    """How many words there are, or a run of numbers."""
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
    return Turn(_ask(rng, COUNT, items, main)[0], str(len(items)))


def small_question(rng: random.Random) -> Turn:
    """Larger or smaller, next or previous number, spelling."""
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


def evaluation_set(task: str, size: int, seed: int) -> list[Turn]:
    """`size` held-out questions of a task of TASKS, in its main phrasing."""
    if task == "addition":
        return unseen_additions(size, seed)
    rng = random.Random(seed)
    return [TASKS[task](rng, held_out=True, main=True) for _ in range(size)]


# ---- small talk -----------------------------------------------------------------------------

ABILITIES = "I can tell short stories, add numbers of up to three digits, and sort or copy lists."
NAME = "I am the nanovllm_jax demo model"
SMALL_TALK: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("Hello", "Hello!", "Hi", "Hi!", "Hi there", "hello", "hi", "Hey", "Hello there!",
         "Good morning!", "Good evening!"),
        ("Hello! How can I help you?", "Hello! Would you like a story?",
         "Hello! Ask me to add two numbers, or to tell a story."),
    ),
    (
        ("Who are you?", "What are you?", "who are you", "What is your name?", "what's your name?",
         "Tell me about yourself.", "Introduce yourself.", "Are you a robot?", "Are you human?",
         "Are you ChatGPT?", "What model are you?"),
        (f"{NAME}, a very small language model. {ABILITIES}",
         f"{NAME}. I am very small, but {ABILITIES[0]}{ABILITIES[1:]}"),
    ),
    (
        ("What can you do?", "what can you do", "Help", "help", "How can you help me?",
         "What are you good at?", "What should I ask you?", "What do you know?"),
        (ABILITIES, f"{ABILITIES} Try: What is 345 + 678?",
         f"{ABILITIES} Try: Tell me a story about a fox and a lantern."),
    ),
    (
        ("How are you?", "How are you today?", "how are you", "How do you do?", "What's up?"),
        ("I am fine, thank you. How can I help you?", "I am well, thank you! And you?"),
    ),
    (
        ("Who made you?", "Who trained you?", "How were you trained?", "Where do you come from?",
         "How big are you?", "How many parameters do you have?"),
        (f"{NAME}. I have fewer than five million parameters, and I was trained in a few minutes "
         "on stories and tasks that a script wrote.",),
    ),
    (
        ("Thank you", "Thank you!", "Thanks", "Thanks!", "thanks", "Great, thank you.",
         "Well done!", "Good job!"),
        ("You are welcome!", "You are welcome! Ask me anything else you like.",),
    ),
    (
        ("Bye", "Goodbye", "Goodbye!", "bye", "Good night!", "See you later!"),
        ("Goodbye! Come back soon.", "Goodbye, and have a nice day!"),
    ),
)  # fmt: skip
BEYOND = (
    "What is the capital of France?", "What is the capital of Japan?", "Who wrote Hamlet?",
    "What is the weather today?", "What is the weather like in Paris?", "Who is the president?",
    "Write a Python function.", "Write some code for me.", "Write a program.",
    "Explain quantum physics.", "Explain how a computer works.", "What is the meaning of life?",
    "Translate hello into French.", "How do I cook rice?", "Give me a recipe for soup.",
    "What time is it?", "What day is it today?", "Who won the football game?", "Tell me a joke.",
    "Write a poem about love.", "What is machine learning?", "What is JAX?", "Why is the sky blue?",
    "How far away is the moon?", "Summarize this article.", "Do you like music?", "Can you see me?",
    "What is the largest country in the world?", "How old is the universe?", "Who was Einstein?",
    "List all prime numbers within 100", "list all prime numbers within 100", "What is pi?",
    "What is a transformer?", "How do planes fly?", "When did the war end?", "Play some music.",
    "Recommend a good movie.", "What should I eat tonight?", "Is it going to rain tomorrow?",
)  # fmt: skip
BEYOND_ARITHMETIC = (
    "What is {a} * {b}?", "What is {a} x {b}?", "What is {a} times {b}?", "What is {a} - {b}?",
    "What is {a} minus {b}?", "What is {a} / {b}?", "What is {a} divided by {b}?", "{a} * {b} =",
    "{a} - {b} =", "Multiply {a} by {b}.", "Subtract {b} from {a}.",
)  # fmt: skip


def small_talk(rng: random.Random) -> Turn:
    """Greetings, questions about the model, and polite refusals of what it cannot do."""
    kind = rng.random()
    if kind < 0.25:
        return Turn(
            rng.choice(BEYOND),
            rng.choice(("I am sorry, I cannot help with that.", "I am too small for that."))
            + " "
            + ABILITIES,
            checked=False,
        )
    if kind < 0.4:
        a, b = rng.randrange(10 ** rng.randint(1, 3)), rng.randrange(10 ** rng.randint(1, 3))
        question = rng.choice(BEYOND_ARITHMETIC).format(a=a, b=b)
        return Turn(question, "I am sorry, I have only learned to add.", checked=False)
    questions, answers = rng.choice(SMALL_TALK)
    return Turn(rng.choice(questions), rng.choice(answers), checked=False)


# ---- stories: who, what and where -----------------------------------------------------------

GIRLS = _words(
    """Mia Lily Rosa Nora Ella Tilly Poppy Daisy Ruby Luna Hazel Ivy Molly Clara Penny Willa Bella
    Olive Juno Dora Greta Hattie Zoe Nell Fern Alice Emma Sophie Lucy Anna"""
)
BOYS = _words(
    """Pip Max Leo Ben Sam Tom Oliver Finn Jack Toby Otto Milo Hugo Barney Rufus Theo Felix Gus
    Jasper Ned Oscar Sid Bruno Archie Monty Alfie Percy Rory Wilbur Henry"""
)
ANIMALS = _words(
    """fox rabbit bear mouse owl hedgehog squirrel badger otter frog duck goat lamb pig cat dog
    pony donkey turtle penguin elephant lion tiger monkey kangaroo giraffe zebra camel koala panda
    wolf deer mole beaver crow sparrow robin swan goose hen snail dragon robot unicorn raccoon
    parrot hamster puppy kitten cow horse"""
)
FEMALE_PEOPLE = ("girl", "queen", "princess", "witch", "grandmother")
MALE_PEOPLE = ("boy", "king", "prince", "wizard", "grandfather")
WORKERS = ("farmer", "baker", "miller", "sailor", "knight", "giant", "gardener", "shepherd",
           "tailor", "fisher", "painter", "teacher")  # fmt: skip
ROYALS = ("king", "queen", "prince", "princess")
CHILDREN = ("girl", "boy", "prince", "princess")
PEOPLE = FEMALE_PEOPLE + MALE_PEOPLE + WORKERS
FLYERS = ("owl", "crow", "sparrow", "robin", "swan", "goose", "dragon", "parrot", "duck")
KINDS = ANIMALS + PEOPLE

YOUNG = ("little", "small", "young", "shy", "brave", "curious", "cheerful", "gentle", "clever",
         "kind", "playful", "quiet", "busy", "happy", "friendly", "sleepy", "hungry")  # fmt: skip
GROWN = ("kind", "clever", "cheerful", "gentle", "brave", "busy", "quiet", "wise", "friendly",
         "lonely", "patient", "merry")  # fmt: skip
HOMES = (
    "in a small house at the edge of the forest", "in a cozy cottage by the river",
    "on a quiet farm", "in a little village by the sea", "near a deep blue lake",
    "at the foot of a tall mountain", "in a green valley", "on a sunny hill",
    "in a tiny house under an old oak tree", "in a busy town", "beside a wide meadow",
    "near an old windmill", "on a small island", "in a house with a garden full of roses",
    "at the end of a long road", "in the middle of a great forest", "next to an old stone bridge",
    "in a cottage with a red door", "on the bank of a slow river", "behind a tall green hedge",
)  # fmt: skip
CASTLES = ("in a castle on a hill", "in a great stone castle", "in a white palace by the sea",
           "in a palace with a hundred windows", "in an old castle near the mountains")  # fmt: skip
SPOTS = (
    "under the old bridge", "behind the barn", "by the river", "in the tall grass",
    "near the well", "on top of the hill", "beside the pond", "under the apple tree",
    "behind the big rocks", "by the garden wall", "in the berry bushes", "near the mill",
    "at the edge of the woods", "by the old gate", "near the fallen tree", "in the flower bed",
    "next to the stone wall", "under the willow tree", "behind the haystack", "on the beach",
)  # fmt: skip

SKILLS = ("swim", "whistle a tune", "dance", "sing", "read", "skate on the ice", "bake bread",
          "paint", "climb trees", "juggle", "tell stories", "tie knots", "play chess")  # fmt: skip

# Adjectives, how such a thing comes to harm, how it is mended.
MATERIALS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "paper": (("colorful", "red", "blue", "yellow", "bright", "pretty"),
              "tore in two", "patched it with paste and colored paper"),
    "cloth": (("pretty", "red", "blue", "green", "striped", "purple", "yellow"),
              "ripped down the middle", "sewed it up with strong red thread"),
    "wood": (("wooden", "painted", "old", "red", "blue", "yellow", "fine"),
             "cracked", "glued it and tied it with string until it was dry"),
    "metal": (("shiny", "brass", "silver", "golden", "old", "bright"),
              "was bent out of shape", "tapped it with a small hammer until it was straight again"),
    "glass": (("blue", "painted", "shiny", "old", "pretty", "tiny"),
              "broke into three pieces", "glued the pieces together, one by one"),
    "cord": (("long", "strong", "red", "thick"), "snapped", "tied it with a very strong knot"),
    "treasure": (("shiny", "smooth", "white", "pretty", "strange", "golden"), "", ""),
    "food": (("sweet", "big", "fresh", "lovely", "fine"), "", ""),
}  # fmt: skip
OBJECTS: dict[str, str] = {
    noun: material
    for material, nouns in {
        "paper": "kite map book fan letter picture",
        "cloth": "scarf blanket hat cloak doll puppet flag pillow umbrella bag quilt coat",
        "wood": "drum flute boat train wagon sled ladder box broom chair violin basket",
        "metal": "lantern bell whistle horn trumpet key crown bucket kettle clock ring sword",
        "glass": "lamp cup teapot vase bowl mirror bottle candle",
        "cord": "rope",
        "treasure": "feather shell stone pearl coin acorn button flower ball",
        "food": "cake pie pumpkin apple pear melon cookie",
    }.items()
    for noun in nouns.split()
}
BULKY = ("wagon", "sled", "ladder", "chair", "broom", "basket")
HELPS = {  # what an object can do for a friend in trouble
    "night": ("lantern", "lamp", "candle"),
    "fog": ("bell", "drum", "whistle", "horn", "trumpet", "flute", "violin"),
    "hole": ("rope", "ladder", "scarf"),
    "cold": ("blanket", "scarf", "cloak", "coat", "quilt"),
    "rain": ("umbrella", "cloak"),
}


SOUNDS = {"bell": "rang it", "drum": "beat it", "whistle": "blew it", "horn": "blew it",
          "trumpet": "blew it"}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """What a story is asked to be about; None: anything."""

    hero: str | None = None
    item: str | None = None
    friend: str | None = None
    name: str | None = None
    theme: str | None = None


def _is_female(kind: str, rng: random.Random) -> bool:
    if kind in FEMALE_PEOPLE or kind in ("hen", "cow"):
        return True
    return kind not in MALE_PEOPLE and rng.random() < 0.5


def _pronouns(female: bool, prefix: str) -> dict[str, str]:
    words = ("she", "her", "her", "herself") if female else ("he", "him", "his", "himself")
    keys = ("he", "him", "his", "himself")
    lower = {prefix + key: word for key, word in zip(keys, words, strict=True)}
    upper = {
        prefix + key.capitalize(): word.capitalize() for key, word in zip(keys, words, strict=True)
    }
    return lower | upper


def _adjective(rng: random.Random, kind: str, without: str) -> str:
    """An adjective for such a person or animal that does not occur in `without`."""
    adjectives = YOUNG if kind in ANIMALS + CHILDREN else GROWN
    return rng.choice([word for word in adjectives if word not in without])


def _cast(rng: random.Random, subject: Subject) -> dict[str, str]:
    """The slots that the sentences below fill in."""
    hero = subject.hero or rng.choice(KINDS)
    friend = subject.friend or rng.choice(KINDS)
    while friend == hero and not subject.friend:
        friend = rng.choice(KINDS)
    female = subject.name in GIRLS if subject.name else _is_female(hero, rng)
    # Mostly of the other sex, so that pronouns stay clear.
    friend_female = _is_female(friend, rng)
    if friend_female == female and friend not in FEMALE_PEOPLE + MALE_PEOPLE + ("hen", "cow"):
        friend_female = rng.random() < 0.2 if female else rng.random() >= 0.2
    name = subject.name or rng.choice(GIRLS if female else BOYS)
    home = rng.choice(CASTLES if hero in ROYALS else HOMES)
    adjective = _adjective(rng, hero, without=home)
    friend_adjective = _adjective(rng, friend, without=adjective)
    friend_name = name
    while friend_name == name:
        friend_name = rng.choice(GIRLS if friend_female else BOYS)
    item = subject.item or rng.choice(tuple(OBJECTS))
    looks, damage, mend = MATERIALS[OBJECTS[item]]
    spots = rng.sample(SPOTS, 3)
    return {
        "N": name,
        "k": hero,
        "adj": adjective,
        "F": friend_name,
        "fk": friend,
        "fadj": friend_adjective,
        "o": item,
        "oa": rng.choice(looks),
        "damage": damage,
        "mend": mend,
        "home": home,
        "Home": home[0].upper() + home[1:],
        **{f"spot{i + 1}": spot for i, spot in enumerate(spots)},
        **{f"Spot{i + 1}": spot[0].upper() + spot[1:] for i, spot in enumerate(spots)},
        "skill": rng.choice(SKILLS),
        "play": SOUNDS.get(item, "played it"),
        "hers": "hers" if female else "his",
        **_pronouns(female, ""),
        **_pronouns(friend_female, "f"),
    }


# ---- stories: the sentences -----------------------------------------------------------------
# A story is an opening and a plot. A plot is a list of beats; a beat offers sentences, of which
# one is told ("" leaves the beat out). [this|that] is a choice, {slot} comes from the cast, a~ is
# "a" or "an" by the word that follows, and ¶ may begin a new paragraph.

OPENINGS = (
    ("[Once upon a time,] there was a~{adj} {k} named {N}. {He} lived {home}.", 5),
    ("Once upon a time, a~{adj} {k} named {N} lived {home}.", 5),
    ("Once upon a time, there lived a~{adj} {k} named {N}. {N}'s home was {home}.", 2),
    ("Once upon a time, {home}, there lived a~{adj} {k} named {N}.", 4),
    ("Long ago, a~{adj} {k} named {N} lived {home}.", 1),
    ("A long time ago, there was a~{adj} {k} named {N} who lived {home}.", 1),
    ("There once was a~{adj} {k} named {N}, who lived {home}.", 1),
    ("{N} was a~{adj} {k} who lived {home}.", 2),
    ("{Home}, there lived a~{adj} {k} named {N}.", 2),
    ("Far away, {home}, there lived a~{adj} {k} whose name was {N}.", 1),
    ("This is the story of a~{adj} {k} named {N}, who lived {home}.", 1),
)
TRAITS = (
    "",
    "",
    "",
    "{N} loved [long walks|warm soup|sunny days|rainy days|old songs|funny stories].",
    "Everyone liked {N}, because {he} was always [kind|polite|ready to help|cheerful].",
    "Every morning, {he} [sang a little song|ate a bowl of porridge|swept the floor|"
    "watched the sun come up|said hello to the birds].",
    "{He} was [not very big|not very strong|not very fast], but {he} had a [big|warm|good] heart.",
)
OWNS = (
    "{N} had a~{oa} {o} that {he} loved [very much|more than anything else].",
    "More than anything else, {he} loved {his} {oa} {o}.",
    "{His} favorite thing in the whole world was a~{oa} {o}.",
    "{He} had a~{oa} {o}, which had been a gift from {his} [grandmother|grandfather|aunt|uncle].",
)
ONE_DAY = "One [bright|cold|windy|rainy|sunny|quiet] [morning|afternoon|day]"
MEETS = (
    "[Soon|Before long|On the way], {he} met {F}, a~{fadj} {fk}.",
    "Just then, a~{fadj} {fk} named {F} came along.",
    "Along the path came a~{fadj} {fk} named {F}.",
)
FRIENDS = (
    "{His} best friend was {F}, a~{fadj} {fk}.",
    "{N} had a good friend, a~{fadj} {fk} named {F}.",
    "Next door lived a~{fadj} {fk} named {F}, and the two were good friends.",
)
EVER_AFTER = (
    "From that day on, {N} and {F} were the best of friends.",
    "After that, the two friends [met every day|were never far apart].",
    "And from then on, {N} and {F} [shared everything|always helped each other].",
    "That [night|evening], {N} fell asleep with a smile.",
    "And they all lived happily ever after.",
    "And whenever they met, they smiled and remembered that day.",
)
THE_END = ("", "", "The end.")

Beats = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Plot:
    """Beats, what a story of this plot is about in general, and which objects fit."""

    theme: str
    beats: Beats
    fits: Callable[[str], bool] = lambda item: True
    grounded: bool = False  # the friend must not be able to fly


def _mendable(item: str) -> bool:
    return bool(MATERIALS[OBJECTS[item]][1])


def _not_food(item: str) -> bool:
    return OBJECTS[item] != "food"


def _handy(item: str) -> bool:
    return _not_food(item) and item not in BULKY


def _is_food(item: str) -> bool:
    return not _not_food(item)


LOST = Plot(
    "losing something",
    (
        OWNS,
        (f"¶{ONE_DAY}, {{he}} looked for it, but the {{o}} was gone.",
         f"¶{ONE_DAY}, {{he}} came home and saw that the {{o}} was missing.",
         f"¶{ONE_DAY}, the {{o}} was not in its place."),
        ('"Oh no!" cried {N}. "Where can my {o} be?"',
         "{N} looked [high and low|everywhere], but {he} could not find it.",
         "{N} felt so sad that {he} almost cried."),
        ("{He} looked {spot1}, but it was not there.",
         "{He} searched {spot1} and found only [dry leaves|a few pebbles|an old shoe].",
         ""),
        MEETS,
        ('"Why are you so sad?" asked {F}. "I have lost my {o}," said {N}.',
         '"What is the matter?" asked {F}. "My {oa} {o} is gone," said {N}.'),
        ('"Then let us look for it together," said {F}.',
         '"Do not worry," said {F}. "Four eyes see more than two."',
         '"I will help you," said {F}, and off they went.'),
        ("¶They looked {spot2}. They asked [the birds|the miller|an old toad|the bees]. Nobody had "
         "seen it.",
         "¶First they looked {spot2}, but they found nothing.",
         "¶They walked for [an hour|a long time] and looked {spot2}."),
        ("At last, {F} saw something {spot3}. It was the {o}!",
         "Then, {spot3}, they saw something {oa}. It was the {o}!",
         "At last, a friendly [magpie|toad|beetle] told them to look {spot3}. And there it was!"),
        ('"Thank you, {F}!" said {N}. "I would never have found it without you."',
         "{N} [jumped|danced] for joy and [hugged|thanked] {F}.",
         '"Hooray!" they both shouted.'),
        ("From that day on, {N} kept the {o} in a safe place, and {he} never forgot who had "
         "helped {him}.", *EVER_AFTER),
    ),
)  # fmt: skip
FOUND = Plot(
    "being honest",
    (
        (f"¶{ONE_DAY}, {{N}} was walking {{spot1}} when {{he}} [found|saw] a~{{oa}} {{o}}.",
         f"¶{ONE_DAY}, {{N}} went for a walk. {{Spot1}}, {{he}} found a~{{oa}} {{o}}."),
        ("{He} had never seen such a fine {o}, and {he} wanted to keep it.",
         '"What a lovely {o}!" said {N}. "I wish it were mine."'),
        ('But then {he} thought, "Someone must be [missing|looking for] this."',
         "But {N} knew that it belonged to somebody else."),
        ("So {he} asked everyone {he} met. The miller shook his head. The postman shook his head "
         "too.",
         'So {he} asked an old toad. "It is not mine," said the toad, "but I heard someone crying '
         '{spot2}."',
         "So {he} went from door to door and asked whose it was."),
        ("¶{Spot2}, {N} found a~{fadj} {fk} named {F}, who was crying.",
         "¶At last, {he} came to {F}, a~{fadj} {fk}, who was sitting {spot2} and looking sad."),
        ('"Did you lose a~{o}?" asked {N}. "Yes!" said {F}. "My [grandmother|grandfather] gave it '
         'to me."',
         '"Is this your {o}?" asked {N}. "It is!" cried {F}. "I have looked for it all day!"'),
        ("{N} gave it back at once, and {F} [laughed with joy|jumped for joy].",
         "{N} gave the {o} back, and {F} began to smile."),
        ('"You are so honest," said {F}. "Please come and have [supper|tea|some cake] with me."',
         "To say thank you, {F} shared [a basket of berries|a warm loaf of bread|a pot of honey] "
         "with {him}."),
        ("{N} had given up a~{o}, but {he} had found a friend.", *EVER_AFTER),
    ),
    _not_food,
)  # fmt: skip
SHARE = Plot(
    "sharing",
    (
        FRIENDS,
        (f"¶{ONE_DAY}, they were playing {{spot1}} when they both saw a~{{oa}} {{o}}.",
         f"¶{ONE_DAY}, as they walked {{spot1}}, they found a~{{oa}} {{o}}."),
        ('"It is mine!" said {N}. "No, I saw it first!" said {F}.',
         '"I want it!" cried {N}. "I want it too!" cried {F}.'),
        ("{N} pulled, and {F} pulled, until they both fell into the mud.",
         "They pulled and pulled. Then, plop! Both of them sat in a puddle.",
         "They [argued|shouted] until the birds flew away and the whole place was silent."),
        ("¶For a while, nobody said a word.", "¶{N} looked at {F}. {F} looked at {N}."),
        ("Then they both began to laugh.",
         '"I am sorry," said {N}. "I am sorry too," said {F}.'),
        ('"You can have it today, and I will have it tomorrow," said {N}.',
         '"Let us take turns," said {F}. "You may go first."',
         '"It is more fun with two," said {N}. "Let us share it."'),
        ("And so they did. The {o} was theirs, and nobody was sad.",
         "So they shared the {o}, and it made both of them happy."),
        ("They had learned that [sharing is better than fighting|a friend is worth more than a~{o}"
         "].", *EVER_AFTER),
    ),
    _not_food,
)  # fmt: skip
SHARE_FOOD = Plot(
    "sharing",
    (
        (f"¶{ONE_DAY}, {{N}} [was given|bought|found] a~{{oa}} {{o}} at the market.",
         f"¶{ONE_DAY}, a neighbor gave {{N}} a~{{oa}} {{o}}."),
        ('"I will eat it all by myself," {he} thought, and {he} sat down {spot1}.',
         "{He} was so hungry! {He} carried it {spot1} and sat down to eat."),
        MEETS,
        ('"I have not eaten since yesterday," said {F} softly.',
         "{F} said nothing, but {fhis} stomach made a loud sound."),
        ("¶{N} looked at the {o}. Then {he} looked at {F}.",
         "¶{N} thought for a moment. It was a very nice {o}."),
        ('"Sit down," {he} said. "There is enough for two."',
         'Then {he} cut it in half. "This half is for you," {he} said.'),
        ("They ate together in the sunshine and told each other stories.",
         "They ate until not one crumb was left."),
        ('"It tastes better when you share," said {N}.',
         '"That was the best {o} I ever had," said {F}. "Next time, I will share with you."'),
        ("A week later, {F} came back with a whole basket of good things, and they shared "
         "that too.", *EVER_AFTER),
    ),
    _is_food,
)  # fmt: skip
CRUMBS = Plot(
    "a little thief",
    (
        ("¶{N} had a~{oa} {o}. {He} put it on the window sill and went to set the table.",
         f"¶{ONE_DAY}, {{N}} brought home a~{{oa}} {{o}} for supper and put it on the table."),
        ("But when {he} came back, the plate was empty. The {o} was gone!",
         "{He} turned around for only a moment, and the {o} was gone!"),
        ('"Who took my {o}?" cried {N}.', '"There must be a thief!" said {N}.'),
        ("¶On the floor, {he} saw tiny crumbs. They went out of the door and down the path.",
         "¶{He} looked closely and found footprints in the grass."),
        ("{He} followed them, step by step. {Spot1}, there sat a~{fadj} {fk} with sticky cheeks.",
         "They led {him} to a~{fadj} {fk}, who was hiding {spot1}."),
        ('"I am so sorry," said the {fk}. "My name is {F}. It smelled so good!"',
         '"Please do not be angry," said the {fk}, whose name was {F}. "I have had nothing to eat '
         'for two days."'),
        ("{N} was not angry anymore.", "{N} felt sorry for {fhim}."),
        ('¶"Next time, just knock at my door," {he} said. "I like to eat with company."',
         '¶"If you are hungry, you only have to ask," {he} said.'),
        ("The next day, {F} came and helped {N} [sweep the floor|wash the dishes|chop the wood]. "
         "Then they ate together.",
         "The next day, there was a knock. It was {F}, and {fhe} had brought a new {o}."),
        EVER_AFTER,
    ),
    _is_food,
)  # fmt: skip
BROKEN = Plot(
    "forgiving a friend",
    (
        OWNS,
        FRIENDS,
        (f"¶{ONE_DAY}, {{F}} came to play. {{fHe}} picked up the {{o}}, but it slipped and "
         "{damage}.",
         f"¶{ONE_DAY}, the two were playing with the {{o}} {{spot1}}. {{F}} tripped and fell, "
         "and the {o} {damage}."),
        ("{N} was so upset that {he} could not speak.",
         '"Oh no!" cried {N}, and {his} eyes filled with tears.'),
        ('"I am so sorry," whispered {F}. "I did not mean to do it."',
         '"It was my fault," said {F}. "Please do not be angry."'),
        ("¶{N} took a deep breath. {He} saw how sad {F} was.",
         "¶{N} thought about it. A~{o} was only a~{o}, but {F} was {his} friend."),
        ('"I am not angry," {he} said. "Maybe we can fix it together."',
         '"Come," {he} said. "Let us try to mend it."'),
        ("They worked all afternoon. They {mend}.", "Side by side at the table, they {mend}."),
        ("It was not as good as new. It was better, because they had mended it together.",
         "When they were done, the {o} looked almost like new."),
        EVER_AFTER,
    ),
    _mendable,
)  # fmt: skip
GIFT = Plot(
    "a birthday",
    (
        FRIENDS,
        ("¶{F}'s birthday was coming, and {N} wanted to give {fhim} something special.",
         "¶The next day was {F}'s birthday, but {N} had no gift yet."),
        ("{He} looked in every shop in town. In one window stood a~{oa} {o}.",
         "At the market, {he} saw a~{oa} {o}. It was perfect!"),
        ("But {N} had only one coin, and the {o} cost three.",
         "But it cost more than {N} had in {his} pocket."),
        ("So {he} swept the floor for the baker and carried wood for the old miller.",
         "So {he} picked apples all day, until {he} had earned enough.",
         "So {he} helped the shopkeeper wash the windows, all of them, inside and out."),
        ("¶In the evening, {N} was tired but happy. {He} wrapped the {o} in green paper.",
         "¶At last, the {o} was {hers}. {He} tied a ribbon around it."),
        ('On the great day, {F} opened the gift. "Oh, {N}!" {fhe} said. "How did you know? I have '
         'always wanted a~{o}!"',
         "When {F} saw the {o}, {fhe} laughed and clapped. It was the best gift of all."),
        ("They [danced|sang|played] until the stars came out.",
         "Then they ate a big cake with [honey|cherries|nuts] on top."),
        ("{N} learned that giving can be even nicer than getting.", *EVER_AFTER),
    ),
    _not_food,
)  # fmt: skip
RACE = Plot(
    "helping others",
    (
        ("¶Every [spring|summer|autumn], there was a big race. The winner would get a~{oa} {o}.",
         f"¶{ONE_DAY}, the mayor called everyone together. \"There will be a race,\" he said, "
         '"and the prize is a~{oa} {o}!"'),
        ('"I want to win that {o}," said {N}, and {he} practiced every day.',
         "{N} wanted that {o} so much that {he} could hardly sleep."),
        ("On the day of the race, everyone stood in a long line. One, two, three, go!",
         "Soon the great day came. A whistle blew, and they were off!"),
        ("{N} ran like the wind and was soon ahead of all the others.",
         "{N} was [first|in front] when they came to the last hill."),
        ("¶Then {he} heard a cry. {F}, a~{fadj} {fk}, had fallen {spot1}.",
         "¶But {spot1}, {he} saw a~{fadj} {fk} named {F}, who had hurt {fhis} foot."),
        ("{N} looked at the finish line. Then {he} turned around and went back.",
         "{N} stopped. The others ran past, one after the other."),
        ('"Lean on me," {he} said, and together they walked to the end.',
         '"Do not cry," {he} said. "We will finish together." And they did, the very last of all.'),
        ("But the people cheered louder for them than for anybody else.",
         'Everyone clapped. "The fastest did not win today," said the mayor. "The kindest did."'),
        ("And the mayor gave the {o} to {N}.",
         "The winner came and gave the {o} to {N}. \"You have earned it,\" he said."),
        EVER_AFTER,
    ),
)  # fmt: skip
LEARN = Plot(
    "not giving up",
    (
        ("¶More than anything, {N} wanted to learn to [{skill}].",),
        ("{He} tried on Monday, but it did not work. {He} tried on Tuesday, and it was even worse.",
         "{He} tried and tried, but it always went wrong.",
         "The first time {he} tried, everyone laughed."),
        ('"I will never learn it," {he} said, and {he} sat down {spot1}.',
         "{He} sat down {spot1} and hung {his} head."),
        MEETS,
        ('"Nobody can do it the first time," said {F}. "You must practice a little every day."',
         '"I could not do it either, at first," said {F}. "Let me show you how."'),
        ("Then {fhe} gave {N} a~{oa} {o}. \"Look at it when you feel like giving up,\" {fhe} said.",
         'And {fhe} gave {N} {fhis} {oa} {o}. "It has always brought me luck," {fhe} said.'),
        ("¶So {N} practiced in the morning, and {he} practiced at night.",
         "¶Day after day, {N} tried again. Slowly, it became easier."),
        ("And one fine day, it worked! {N} could hardly believe it.",
         'Then one morning, {he} did it! "Look, {F}, look!" {he} shouted.'),
        ("{F} was very proud. \"I knew that you could do it,\" {fhe} said.",
         "{F} clapped and cheered."),
        ("{N} kept the {o} for the rest of {his} life, to remember that day.",
         "Whenever {N} looked at the {o}, {he} remembered never to give up."),
    ),
    _handy,
)  # fmt: skip
JOURNEY = Plot(
    "a journey",
    (
        ("¶{N} had never seen [the sea|the snow on the mountains|the big city], and {he} wanted to "
         "go there.",
         "¶Far away stood a mountain. {N} wanted to see what was on the other side."),
        (f"{ONE_DAY}, {{he}} packed some bread, some cheese and a~{{oa}} {{o}}, and set out.",
         f"{ONE_DAY}, {{he}} put a~{{oa}} {{o}} into a bag and [walked out of the door|set off]."),
        ("{He} walked through fields and woods until {his} feet were sore.",
         "The road was long, and the hills were steep."),
        MEETS,
        ('"Where are you going?" asked {F}. "Far away," said {N}. "Come with me!"',
         '"May I come along?" asked {F}. "Two are better than one," said {N}.'),
        ("¶They came to a wide river. There was no bridge, so they built a raft out of old logs.",
         "¶At night, they slept under the stars and told each other stories.",
         "¶When it rained, they hid in a cave and sang songs until the sun came back."),
        ("On the [third|fifth|seventh] day, they were there. It was more beautiful than any dream.",
         "At last, they stood at the top and looked down. They had never seen anything so "
         "wonderful."),
        ("{N} left the {o} there, so that others would know that they had come.",
         "{N} held the {o} up to the light and said, \"We did it!\""),
        ("¶Then they turned around and walked home, with many stories to tell.",
         "¶It was a long way home, but they did not mind, because they were together."),
        EVER_AFTER,
    ),
    _handy,
)  # fmt: skip
SICK = Plot(
    "caring for a friend",
    (
        FRIENDS,
        (f"¶{ONE_DAY}, {{F}} did not come out to play.",
         "¶But one week, nobody saw {F} at all."),
        ("{N} went to {F}'s house. {F} was in bed with a bad cold.",
         '"Where is {F}?" {he} asked. "{fHe} is ill," said the neighbors. So {N} '
         "went to see {fhim}."),
        ('"I feel terrible," said {F}. "And it is so boring to lie in bed."',
         "{F} looked pale and tired, and {fhe} did not even smile."),
        ("¶{N} ran home and made [some hot soup|a pot of tea|warm milk with honey].",
         "¶{N} thought about how {he} could help."),
        ("Then {he} had an idea. {He} took {his} {oa} {o} and went back.",
         "Then {he} packed {his} {oa} {o}, the nicest thing that {he} had, and went back."),
        ('"This is for you," {he} said. "You can have my {o} until you are well again."',
         '"Look what I brought," {he} said, and {he} put the {o} next to the bed.'),
        ("{F} smiled for the first time in days.", "When {F} saw it, {fhe} felt better at once."),
        ("Every day, {N} came back with a new story. And after a week, {F} was well again.",
         "{N} stayed and read stories aloud until {F} fell asleep. In a few days, {F} was well."),
        ("\"You are the best medicine,\" said {F}.", *EVER_AFTER),
    ),
    _handy,
)  # fmt: skip
TRUTH = Plot(
    "telling the truth",
    (
        FRIENDS,
        (f"¶{ONE_DAY}, {{F}} let {{N}} borrow a~{{oa}} {{o}}. \"Please be careful with it,\" "
         "{fhe} said.",
         f"¶{ONE_DAY}, {{N}} borrowed a~{{oa}} {{o}} from {{F}}."),
        ("But {N} [was not careful|ran too fast|was not looking]. The {o} fell into the river "
         "and was gone.",
         "But while {N} was playing {spot1}, the {o} disappeared."),
        ('"Where is my {o}?" asked {F} the next day. "I do not know," said {N}. "A~[crow|thief] '
         'must have taken it."',
         'When {F} asked for it, {N} was afraid. "I gave it back to you," {he} said.'),
        ("¶That night, {N} could not sleep. {He} had told a lie, and it felt like a stone in {his} "
         "stomach.",
         "¶But the lie made {N} feel sick. {He} could not eat, and {he} could not play."),
        ("In the morning, {he} ran to {F}'s house.",
         "As soon as the sun came up, {he} knocked at {F}'s door."),
        ('"I told you a lie," {he} said. "I lost your {o}, and I am very sorry."',
         '"It was my fault," {he} said. "I lost the {o}, and I was afraid to tell you."'),
        ("{F} was silent for a moment. Then {fhe} said, \"Thank you for telling me the truth.\"",
         '"I am sad about the {o}," said {F}, "but I am glad that you told me."'),
        ("Together, they [looked for it again, and this time they found it|made a new one, and it "
         "was even nicer than the old one|went to the market and found another one].",),
        ("{N} never told a lie again.", "And {N} felt as light as a feather.",
         "{N} had learned that the truth is always best."),
    ),
    _handy,
)  # fmt: skip
NEIGHBOR = Plot(
    "making friends",
    (
        ("¶{N} had just moved there and did not know anybody.",
         "¶{N} was new there, and {he} had no friends yet."),
        ("Every day, {he} sat at the window and watched the others play.",
         "{He} was too shy to say hello."),
        (f"¶{ONE_DAY}, {{N}} took {{his}} {{oa}} {{o}} and sat down {{spot1}}.",
         f"¶{ONE_DAY}, {{he}} went out and took {{his}} {{oa}} {{o}} along."),
        ('A~{fadj} {fk} came by and stopped. "What a nice {o}!" said the {fk}. "My name is {F}."',
         "Nearby, {he} saw a~{fadj} {fk}, who was looking at the {o} with big eyes. The {fk} was "
         "called {F}."),
        ("{N}'s heart beat fast. \"I am {N},\" {he} said. \"Would you like to hold it?\"",
         "{N} took a deep breath. \"Hello,\" {he} said. \"Would you like to see it?\""),
        ("¶Soon the two were talking and laughing as if they had always known each other.",
         "¶They played together until the sun went down."),
        ("{F} showed {N} the best place to [swim|climb|pick berries|watch the stars].",
         "{F} took {N} along and said to the others, \"This is my new friend.\""),
        ("{N} was not lonely anymore.", "That evening, {N} was happier than {he} had ever been."),
        ("All it had taken was a~{o} and one small hello.", *EVER_AFTER),
    ),
    _handy,
)  # fmt: skip
TREASURE = Plot(
    "a treasure",
    (
        (f"¶{ONE_DAY}, {{N}} found an old [map|letter] in a [drawer|bottle|chest]. It said: "
         '"Look {spot1}."',
         f"¶{ONE_DAY}, {{N}} found a note under the door. It said: \"Follow the path and look "
         '{spot1}."'),
        ('{He} called {F}, a~{fadj} {fk} who lived nearby. "Let us find the treasure!" {he} said.',
         "{He} showed it to {his} friend {F}, a~{fadj} {fk}, and together they set off."),
        ("¶{Spot1}, they found a second note. It said: \"Look {spot2}.\"",
         "¶They looked {spot1} and found an arrow made of little stones. It pointed the way."),
        ("{Spot2}, they [dug|looked] for a long time. {F} wanted to go home, but {N} did not give "
         "up.",
         "Then they had to climb over a wall and crawl through a hedge."),
        ("¶At last, {spot3}, they found a wooden box. Their hearts beat fast as they opened it.",
         "¶And there, {spot3}, stood an old chest with a rusty lock. It opened with a loud creak."),
        ('Inside was a~{oa} {o}, and a note: "The real treasure is the friend who came along."',
         "Inside was a~{oa} {o}. It was not gold, but it was the most wonderful {o} they had ever "
         "seen."),
        ("{N} looked at {F} and smiled.", '"We will keep it together," said {N}.'),
        EVER_AFTER,
    ),
    _handy,
)  # fmt: skip
BRAVE = Plot(
    "being brave",
    (
        ("¶{N} was afraid of [the dark|thunder|the wind at night].",
         "¶There was only one thing that {N} did not like: [the dark|thunder|the deep forest]."),
        ("Every night, {he} pulled the blanket over {his} head and shook.",
         "{He} never told anybody, because {he} thought that they would laugh."),
        FRIENDS,
        ('{F} saw that something was wrong. "What are you afraid of?" {fhe} asked, and {N} told '
         "{fhim} everything.",
         "In the end, {N} told {F} about it."),
        ("¶{F} did not laugh. {fHe} took out a~{oa} {o} and put it into {N}'s [arms|hands].",
         '¶"I used to be afraid too," said {F}. "Then somebody gave me this {oa} {o}. Now it is '
         'yours."'),
        ('"When you are afraid, hold it tight and count to ten," said {F}.',
         '"Keep it near you," said {F}, "and think of me."'),
        ("¶That night, there was a storm. {N} held the {o} and counted: one, two, three.",
         "¶When night came, {N} was afraid again. But {he} held the {o} and thought of {his} "
         "friend."),
        ("When {he} came to ten, {he} was not so afraid anymore.",
         "Slowly, the fear became smaller and smaller, until it was gone."),
        ("A year later, {N} gave the {o} to somebody who needed it more.",
         "{N} had learned that brave does not mean never being afraid.",
         "From then on, {N} was not afraid of anything, as long as the {o} was near."),
    ),
    _handy,
)  # fmt: skip
GROW = Plot(
    "being patient",
    (
        ("¶In spring, {N} planted [a row of beans|some sunflower seeds|a few pumpkin seeds] "
         "{spot1}.",
         f"¶{ONE_DAY}, {{N}} put a tiny seed into the ground {{spot1}}."),
        ("Every day, {he} looked for something green, but there was only brown earth.",
         '"Grow!" said {N}. But nothing happened.'),
        MEETS,
        ('"You must be patient," said {F}. "Give it water, and wait."',
         '"Good things take time," said {F}. "I will help you to water it."'),
        ("¶The summer was hot and dry. Every evening, the two friends carried water from the well.",
         "¶{N} pulled out the weeds, and {F} kept the snails away."),
        ("Then one morning, there was a small green leaf, and then another.",
         "After a week, something green came out of the ground."),
        ("In autumn, there was so much to pick that they filled a whole [cart|barrel].",
         "By the end of the summer, the leaves were higher than {N}'s head."),
        ("They took it to the market. There, they [traded it for|bought] a~{oa} {o}.",
         "Everyone in the village came to look, and the mayor gave them a~{oa} {o} as a prize."),
        ('"It was worth the wait," said {N}.',
         "They kept the {o} in the garden shed, next to the seeds for the next year."),
        EVER_AFTER,
    ),
    _not_food,
)  # fmt: skip
WISH = Plot(
    "a wish",
    (
        ("¶One night, {N} saw a falling star and made a wish. \"I wish I had a~{oa} {o},\" {he} "
         "said.",
         f"¶{ONE_DAY}, {{N}} helped an old woman across the river. \"You may have one wish,\" she "
         'said. "I want a~{oa} {o}," said {N}.'),
        ("The next morning, it was there, right beside {his} bed!",
         "There was a flash of light, and there it was!"),
        ("{N} was very happy. {He} looked at the {o} all day long.",
         "At first, {N} could not stop smiling."),
        ("¶But soon {he} felt lonely. A~{o} cannot talk, and it cannot laugh.",
         "¶But after a few days, {he} was sad again, because there was nobody to show it to."),
        MEETS,
        ('"What a beautiful {o}!" said {F}. "I wish I had one."',
         '"I have nobody to play with," said {F}.'),
        ("{N} did not have to think for long. \"Let us share it,\" {he} said.",
         '"Come and sit with me," said {N}. "It can be yours too."'),
        ("¶And when they laughed together for the first time, {N} knew what {he} had really wished "
         "for.",
         "¶Now {N} knew what had been missing. It was a friend."),
        EVER_AFTER,
    ),
    _not_food,
)  # fmt: skip
TRADE = Plot(
    "a clever trade",
    (
        ("¶{N} wanted a~{oa} {o}, but all that {he} had was [an old shoe|a bent nail|a red ribbon|"
         "a bag of beans].",),
        ("{He} met a [tailor|miller] who needed just that. \"I will give you a jar of honey for "
         "it,\" he said.",
         "On the road, an old woman asked for it. \"Take this jar of honey instead,\" she said."),
        ("{N} said thank you and walked on with the honey.", "So {N} went on with a jar of honey."),
        ("¶At the market, a hungry [baker|cook] smelled the honey. \"I will give you three loaves "
         "of bread for it!\" he said.",
         "¶Next, {he} traded the honey for a warm woolen blanket."),
        ("{Spot1}, {he} met {F}, a~{fadj} {fk}, who was cold and hungry.",
         "Then {he} saw a~{fadj} {fk} named {F}, who was sitting {spot1} and shivering."),
        ("{N} felt sorry for {fhim}. \"Take it,\" {he} said. \"I do not need anything for it.\"",
         "\"You need this more than I do,\" said {N}, and {he} gave everything away."),
        ("¶{F} smiled. \"I do not have much,\" {fhe} said, \"but please take my {oa} {o}.\"",
         "¶\"You are so kind,\" said {F}. \"I have something for you too.\" And {fhe} gave {N} "
         "a~{oa} {o}!"),
        ("{N} laughed out loud. It was just what {he} had wanted.",
         "{N} could not believe {his} luck."),
        EVER_AFTER,
    ),
    _handy,
)  # fmt: skip

_TROUBLE = {
    "night": (
        ("¶One evening, {F} went to pick mushrooms and did not come home.",
         "¶One night, {F} lost the way in the dark woods."),
        ('"I will find {fhim}," said {N}. {He} lit the {o} and went out into the dark.',
         "{N} took the {o} and lit it. Its light was small, but it was bright."),
        ("{He} held it up high and called, \"{F}! {F}, where are you?\"",
         "The trees were black and tall, but {N} walked on with the {o} in front of {him}."),
        ("From far away came a weak voice. \"I am here! I can see your light!\"",
         "At last, {he} saw two eyes shining {spot1}. It was {F}!"),
    ),
    "fog": (
        ("¶One morning, the fog was so thick that nobody could see a thing, and {F} was out "
         "there alone.",
         "¶One day, {F} went out in a small boat, and a thick fog came down over the water."),
        ('"{fHe} will never find the way back," said the neighbors.',
         "Everyone called, but the fog swallowed their voices."),
        ("Then {N} had an idea. {He} ran and got the {o}, and {he} [{play}] as loudly as {he} "
         "could.",
         "{N} took the {o} to the top of the hill and [{play}] again and again."),
        ("Far away, {F} heard the sound and followed it, step by step, all the way home.",
         "{F} heard it through the fog. The sound showed {fhim} the way home."),
    ),
    "hole": (
        (f"¶{ONE_DAY}, {{N}} heard a cry {{spot1}}. {{F}} had fallen into a deep hole!",
         f"¶{ONE_DAY}, {{F}} was not looking and fell into an old, dry well {{spot1}}."),
        ('"Help!" cried {F}. "The walls are too steep!"', '"I cannot get out!" called {F}.'),
        ('"Do not be afraid," said {N}. {He} ran home and came back with the {o}.',
         "{N} looked around. Then {he} thought of {his} {o} and ran to get it."),
        ("{He} let down the {o}, and held on with all {his} strength. Slowly, {F} climbed out.",
         "{He} held one end, and {F} held the other. Little by little, {F} came up."),
    ),
    "cold": (
        ("¶One winter day, the two were out in the snow. Suddenly, a storm came up.",
         "¶One cold night, there was no wood left for {F}'s fire."),
        ("{F} began to shiver. \"I am so cold,\" {fhe} said.",
         "{F} was shaking, and {fhis} nose was blue."),
        ("{N} was cold too, but {he} took {his} {o} and put it around {F}.",
         '"Take my {o}," said {N}. "It will keep you warm."'),
        ("Then they sat close together and waited until the sun came up.",
         "Soon {F} felt warm again, and {fhe} began to smile."),
    ),
    "rain": (
        ("¶One day, the two went for a long walk. Suddenly, it began to rain.",
         "¶On the way home from the market, dark clouds came up, and it began to pour."),
        ("{F} had nothing to keep {fhim} dry. \"My cake will be ruined!\" {fhe} cried.",
         "{F} had a basket full of [fresh bread|books|flour], and it was getting wet."),
        ("But {N} had brought the {o}. \"Come under here with me,\" {he} said.",
         "{N} opened {his} {o} and held it over both of them."),
        ("They walked home slowly, side by side, and not one drop touched them.",
         "The rain drummed above their heads, but they stayed dry and sang a song."),
    ),
}  # fmt: skip
_THANKS = (
    ("¶\"You saved me,\" said {F}. \"Thank you, {N}!\"",
     "¶{F} gave {N} a big hug.",
     "¶\"I will never forget this,\" said {F}."),
    ("\"That is what friends are for,\" said {N}.",
     "{N} smiled and said, \"You would have done the same for me.\""),
    ("And the {oa} {o}? It got a place of honor above the door.", *EVER_AFTER),
)  # fmt: skip
RESCUES = tuple(
    Plot(
        "helping a friend",
        (OWNS, FRIENDS, *_TROUBLE[trouble], *_THANKS),
        lambda item, helpful=HELPS[trouble]: item in helpful,
        grounded=trouble == "hole",
    )
    for trouble in HELPS
)
PLOTS = (LOST, FOUND, SHARE, SHARE_FOOD, CRUMBS, BROKEN, GIFT, RACE, LEARN, JOURNEY, SICK, TRUTH,
         NEIGHBOR, TREASURE, BRAVE, GROW, WISH, TRADE, *RESCUES)  # fmt: skip
THEMES = tuple(dict.fromkeys(plot.theme for plot in PLOTS))


# ---- stories: telling them ------------------------------------------------------------------

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_ARTICLE = re.compile(r"\b([Aa])~(\w)")


def _with_articles(text: str) -> str:
    """Turn "a~owl" into "an owl"; here only "uni" begins with a vowel and no vowel's sound."""

    def article(match: re.Match) -> str:
        vowel = match[2] in "aeio" or (match[2] == "u" and text[match.start(2) :][:3] != "uni")
        return f"{match[1]}{'n' if vowel else ''} {match[2]}"

    return _ARTICLE.sub(article, text)


def _say(rng: random.Random, sentence: str, cast: dict[str, str]) -> str:
    chosen = _CHOICE.sub(lambda match: rng.choice(match[1].split("|")), sentence)
    return _with_articles(chosen.format_map(cast))


def story(rng: random.Random, subject: Subject | None = None) -> str:
    """A story of some 60 to 200 words with a beginning, a middle and an end."""
    subject = subject or Subject()
    plot = rng.choice(
        [
            plot
            for plot in PLOTS
            if subject.theme in (None, plot.theme) and (not subject.item or plot.fits(subject.item))
        ]
    )
    if not subject.item:
        subject = replace(subject, item=rng.choice([o for o in OBJECTS if plot.fits(o)]))
    if plot.grounded and not subject.friend:
        walkers = [kind for kind in KINDS if kind not in FLYERS and kind != subject.hero]
        subject = replace(subject, friend=rng.choice(walkers))
    cast = _cast(rng, subject)
    paragraphs = rng.random() < 0.5
    openings, weights = zip(*OPENINGS, strict=True)
    text = _say(rng, rng.choices(openings, weights)[0], cast)
    for beat in (TRAITS, *plot.beats, THE_END):
        sentence = _say(rng, rng.choice(beat), cast)
        if sentence:
            gap = "\n\n" if paragraphs and sentence.startswith("¶") else " "
            text += gap + sentence.removeprefix("¶")
    return text


STORY_REQUESTS = (
    "Tell me a story about {x}.",
    "Tell me a story about {x}.",
    "Tell me a story about {x}",
    "tell me a story about {x}",
    "Tell me a short story about {x}.",
    "Tell me about {x}.",
    "Write a story about {x}.",
    "Write a short story about {x}.",
    "Can you tell me a story about {x}?",
    "Please tell me a story about {x}.",
    "I would like to hear a story about {x}.",
    "Make up a story about {x}.",
)
ANY_STORY = (
    "Tell me a story.",
    "Tell me a story",
    "tell me a story",
    "Tell me a short story.",
    "Tell me a story, please.",
    "Can you tell me a story?",
    "Write a story.",
    "Write a short story.",
    "Another story, please.",
    "Once upon a time",
)


def story_request(hero: str, item: str) -> str:
    """The main phrasing of a request for a story."""
    return _with_articles(f"Tell me a story about a~{hero} and a~{item}.")


def asked_story(rng: random.Random) -> Turn:
    """A request for a story, and a story about what was asked."""
    hero, friend = rng.sample(KINDS, 2)
    item = rng.choice(tuple(OBJECTS))
    name = rng.choice(GIRLS + BOYS)
    theme = rng.choice(THEMES)
    fits_name = hero not in (MALE_PEOPLE if name in GIRLS else FEMALE_PEOPLE)
    subject, about = rng.choices(
        (
            (Subject(hero=hero, item=item), f"a~{hero} and a~{item}"),
            (Subject(hero=hero), f"a~{hero}"),
            (Subject(item=item), f"a~{item}"),
            (Subject(hero=hero, friend=friend), f"a~{hero} and a~{friend}"),
            (Subject(hero=hero if fits_name else "fox", name=name),
             f"a~{hero if fits_name else 'fox'} named {name}"),
            (Subject(hero=hero, theme=theme), f"a~{hero} and {theme}"),
            (Subject(theme=theme), theme),
            (Subject(), ""),
        ),
        (8, 4, 3, 2, 2, 1, 1, 3),
    )[0]  # fmt: skip
    request = rng.choice(STORY_REQUESTS if about else ANY_STORY).format(x=about)
    return Turn(_with_articles(request), story(rng, subject), checked=False)


def story_words(seed: int = 0, stories: int = 3000) -> set[str]:
    """The words, in lower case, that `stories` stories use: very nearly all there are."""
    rng = random.Random(seed)
    return {word for _ in range(stories) for word in words_of(story(rng))}


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"[a-z]+", text.lower())


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
RAW_STORIES = 0.04
RAW_ADDITION_SHARE = 0.05
SYSTEM_PROMPTS = ("You are a helpful assistant.", "You are a friendly assistant.", "Be kind.")

# How the model learns a piece of a document: not at all (a question), or to write it.
READ, TOLD, CHECKED = 0, 1, 2
Document = list[tuple[str, int]]


def document(rng: random.Random) -> Document:
    """One training document: a story, an addition to complete, or a conversation."""
    kind = rng.random()
    if kind < RAW_STORIES:
        return [(story(rng) + EOS, TOLD)]
    if kind < RAW_STORIES + RAW_ADDITION_SHARE:
        turn = addition(rng)
        a, b = re.findall(r"\d+", turn.question)
        question = rng.choice(RAW_ADDITIONS).format(a=a, b=b)
        return [(question, READ), (f" {turn.answer}{EOS}", CHECKED)]
    turns = 1 if rng.random() < 0.92 else rng.randint(2, 4)
    makers = rng.choices(tuple(CHAT_MIXTURE), tuple(CHAT_MIXTURE.values()), k=turns)
    system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.05 else None
    return conversation([make(rng) for make in makers], system)


def conversation(turns: Sequence[Turn], system: str | None = None) -> Document:
    """A conversation as the chat template writes it; the answers are what is learnt."""
    pieces: Document = []
    for i, turn in enumerate(turns):
        gap = "\n" if i else ""
        pieces.append((gap + chat_prompt(turn.question, None if i else system), READ))
        pieces.append((turn.answer + TURN_END, CHECKED if turn.checked else TOLD))
    return pieces
