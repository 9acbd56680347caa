"""The shipped demo model: through the engine it gives the answers that are known to be right.

`DEMO_QUESTIONS=1000` asks every task all of its questions; by default only addition is.
"""

import importlib
import json
import os
import random
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open
from transformers import AutoTokenizer

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.__main__ import DEMO_MODEL

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))
demo_data = importlib.import_module("demo_data")

OTHERS = int(os.environ.get("DEMO_QUESTIONS", "100"))
OTHER_TASKS = [task for task in demo_data.TASKS if task != "addition"]


@pytest.fixture(scope="module")
def llm():
    """The demo model with few buckets, for a quick start."""
    # On a CPU bfloat16 is emulated, many times slower.
    dtype = "float32" if jax.default_backend() == "cpu" else None
    sizes = dict(max_model_len=512, max_num_batched_tokens=512, max_num_seqs=64)
    with LLM(str(DEMO_MODEL), dtype=dtype, num_kvcache_blocks=140, **sizes) as llm:
        yield llm


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


@pytest.fixture(scope="module")
def recorded():
    """What was measured when the model was trained: exact answers per task, as a share."""
    return json.loads((DEMO_MODEL / "evaluation.json").read_text())


def ask(llm, questions, max_tokens):
    """Greedy answers in chat form: texts, and whether each ended by itself."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    prompts = [demo_data.chat_prompt(question) for question in questions]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    ends = llm.tokenizer.convert_tokens_to_ids([demo_data.TURN_END, demo_data.EOS])
    return [(out["text"], out["token_ids"][-1] in ends) for out in outputs]


def accuracy(llm, turns):
    longest = max(len(llm.tokenizer(turn.answer)["input_ids"]) for turn in turns)
    answers = ask(llm, [turn.question for turn in turns], longest + 1)
    wrong = [
        (turn.question, turn.answer, *answer)
        for turn, answer in zip(turns, answers, strict=True)
        if answer != (turn.answer, True)
    ]
    print("wrong:", *wrong, sep="\n  ")  # pytest shows it where the test fails
    return 1 - len(wrong) / len(turns)


# ---- answers --------------------------------------------------------------------------------


def test_unseen_additions_are_right(llm):
    turns = demo_data.evaluation_set("addition", 1000, seed=1)
    assert accuracy(llm, turns) >= 0.99


def test_additions_are_right_with_an_fp8_cache():
    turns = demo_data.evaluation_set("addition", 200, seed=2)
    options = dict(max_model_len=256, max_num_batched_tokens=256, max_num_seqs=32)
    with LLM(str(DEMO_MODEL), kv_cache_dtype="fp8", num_kvcache_blocks=64, **options) as llm:
        assert llm.runner.state.cache.k.dtype == "float8_e4m3fn"
        assert accuracy(llm, turns) >= 0.99


@pytest.mark.parametrize("task", OTHER_TASKS)
def test_other_tasks_are_as_right_as_when_trained(llm, recorded, task):
    turns = demo_data.evaluation_set(task, 1000, seed=1)[:OTHERS]
    # The first questions may be harder than all thousand: three standard errors.
    share = recorded[task]
    slack = 3 * max(share * (1 - share) / len(turns), 1e-4) ** 0.5
    assert accuracy(llm, turns) >= share - slack


def test_a_second_turn_is_answered(llm, tokenizer):
    messages = [
        {"role": "user", "content": "What is 12 + 34?"},
        {"role": "assistant", "content": "46"},
        {"role": "user", "content": "What is 100 + 250?"},
    ]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    (out,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    assert out["text"] == "350"


def test_it_says_what_it_is(llm):
    (answer, ended), *_ = ask(llm, ["Who are you?"], 64)
    assert ended and "nanovllm_jax demo model" in answer


# ---- stories --------------------------------------------------------------------------------


@pytest.mark.parametrize(("hero", "item"), [("fox", "lantern"), ("owl", "bell")])
def test_a_story_is_english_about_what_was_asked_and_ends(llm, hero, item):
    ((text, ended),) = ask(llm, [demo_data.story_request(hero, item)], 350)
    print(text)
    words = demo_data.words_of(text)
    known = demo_data.story_words()
    assert ended
    assert {hero, item} <= set(words)
    assert 60 <= len(words) <= 250
    assert sum(word in known for word in words) >= 0.98 * len(words)


def test_a_raw_text_is_continued_to_its_end(llm):
    params = SamplingParams(temperature=0, max_tokens=350)
    (out,) = llm.generate(["Once upon a time"], params, use_tqdm=False)
    end = llm.tokenizer.convert_tokens_to_ids(demo_data.EOS)
    assert out["token_ids"][-1] == end
    assert re.match(r",? .*\w+", out["text"])
    assert out["text"].rstrip()[-1] in '.!"'


# ---- the directory --------------------------------------------------------------------------


def test_weights_are_small_and_in_bfloat16():
    path = DEMO_MODEL / "model.safetensors"
    assert path.stat().st_size <= 10_000_000
    with safe_open(path, "np") as tensors:
        kinds = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    assert kinds == {"BF16"}


def test_the_model_card_and_the_record_agree(recorded):
    assert recorded["addition"] >= 0.99
    card = (DEMO_MODEL / "README.md").read_text()
    assert "Unfinished" not in card
    assert f"{100 * recorded['addition']:.1f}%" in card


def test_the_chat_template_is_what_was_trained(tokenizer):
    turns = [demo_data.Turn("What is 1 + 2?", "3"), demo_data.Turn("Hello", "Hi!")]
    messages = [{"role": "system", "content": "Be kind."}]
    for turn in turns:
        messages += [
            {"role": "user", "content": turn.question},
            {"role": "assistant", "content": turn.answer},
        ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    trained = "".join(text for text, _ in demo_data.conversation(turns, "Be kind."))
    assert rendered == trained + "\n"
    asked = tokenizer.apply_chat_template(messages[1:2], add_generation_prompt=True, tokenize=False)
    assert asked == demo_data.chat_prompt("What is 1 + 2?")


def test_the_tokenizer_splits_digits_and_encodes_any_text(tokenizer):
    assert len(tokenizer) <= json.loads((DEMO_MODEL / "config.json").read_text())["vocab_size"]
    assert tokenizer.tokenize("345") == ["3", "4", "5"]
    text = "Ünïcødé 日本語 🙂\t\x00 a  b\r\n\n c "
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    ids = tokenizer(demo_data.chat_prompt("Hi"))["input_ids"]
    turn_start, turn_end = (
        tokenizer.convert_tokens_to_ids(token)
        for token in (demo_data.TURN_START, demo_data.TURN_END)
    )
    assert ids.count(turn_start) == 2 and ids.count(turn_end) == 1


def test_documents_are_tokenized_in_pieces_as_in_whole(tokenizer):
    rng = random.Random(0)
    for _ in range(200):
        document = demo_data.document(rng)
        pieces = [id for text, _ in document for id in tokenizer(text)["input_ids"]]
        assert pieces == tokenizer("".join(text for text, _ in document))["input_ids"]


# ---- the data -------------------------------------------------------------------------------


def test_held_out_additions_are_a_tenth_in_either_order_and_never_trained_on():
    pairs = [(a, b) for a in range(0, 1000, 7) for b in range(0, 1000, 7)]
    held_out = [pair for pair in pairs if demo_data.is_held_out(*pair)]
    assert 0.09 < len(held_out) / len(pairs) < 0.11
    assert all(demo_data.is_held_out(b, a) for a, b in held_out)
    rng = random.Random(0)
    for _ in range(5000):
        a, b = map(int, re.findall(r"\d+", demo_data.addition(rng).question))
        assert not demo_data.is_held_out(a, b)
    documents = ("".join(text for text, _ in demo_data.document(rng)) for _ in range(3000))
    asked = [pair for text in documents for pair in re.findall(r"(\d+) ?\+ ?(\d+)", text)]
    assert len(asked) > 1000
    assert not [pair for pair in asked if demo_data.is_held_out(*map(int, pair))]


def test_the_evaluation_asks_only_what_is_held_out():
    turns = demo_data.evaluation_set("addition", 1000, seed=1)
    assert len({turn.question for turn in turns}) == 1000
    for turn in turns:
        a, b = map(int, re.findall(r"\d+", turn.question))
        assert demo_data.is_held_out(a, b) and turn.answer == str(a + b)
    for turn in demo_data.evaluation_set("sort_numbers", 100, seed=1):
        assert demo_data.is_held_out_list(turn.answer.split(", "))


def test_stories_hold_their_subjects_and_no_trace_of_the_grammar():
    rng = random.Random(0)
    stories = []
    for _ in range(500):
        hero, item = rng.choice(demo_data.KINDS), rng.choice(tuple(demo_data.OBJECTS))
        stories.append(demo_data.story(rng, demo_data.Subject(hero=hero, item=item)))
        assert {hero, item} <= set(demo_data.words_of(stories[-1]))
        assert not re.search(
            r"[{}\[\]|~¶]|  | [.,]|\b[Aa] [aeio]|\b[Aa]n (?!hour)[^aeiou]", stories[-1]
        )
        assert stories[-1][-1] in '.!"'
    assert len(set(stories)) == 500


# ---- the export -----------------------------------------------------------------------------


def test_exported_names_and_shapes_are_those_that_the_loader_joins():
    pytest.importorskip("optax", reason="training needs the extra 'train'")
    train_demo = importlib.import_module("train_demo")
    from flax import nnx

    from nanovllm_jax.models.qwen3 import Qwen3

    trainer = train_demo.Trainer(train_demo.TINY)
    config, tensors, used = trainer.config, {}, set()
    for name, tensor in train_demo.checkpoint(config, trainer.params).items():
        tensors[name] = tensor.astype(np.float32)
    for path, value in jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(trainer.params))[0]:
        parameter = ".".join(key.key for key in path)
        sources, join = Qwen3.checkpoint_tensors(config, parameter)
        stacked = parameter.startswith("layers.")
        joined = []
        for i in range(config.num_layers if stacked else 1):
            names = [name.replace("{i}", str(i)) for name, _ in sources]
            assert [tensors[name].shape for name in names] == [shape for _, shape in sources]
            joined.append(join(*(tensors[name] for name in names)))
            used.update(names)
        expected = np.asarray(value.astype("bfloat16").astype("float32"))
        np.testing.assert_array_equal(np.stack(joined) if stacked else joined[0], expected)
    assert used == set(tensors)


# ---- the training ---------------------------------------------------------------------------


def test_training_lowers_the_loss():
    pytest.importorskip("optax", reason="training needs the extra 'train'")
    train_demo = importlib.import_module("train_demo")
    trainer = train_demo.Trainer(train_demo.TINY, dtype="float32")
    model = trainer.model(trainer.params)
    ids = np.array([3, 511, 0])
    table = np.asarray(model.embed_tokens.weight[...])
    np.testing.assert_array_equal(model.embed_tokens.lookup(ids), table[ids])
    assert type(model.embed_tokens).lookup is train_demo.MatmulEmbedding.lookup

    length = train_demo.TINY.row_length
    rows = np.zeros((4, 3, length), np.int16)  # token, document, kind
    rows[:, 0] = np.arange(length) % 7 + 3  # a text that is easy to learn
    rows[:, 2] = 1
    losses = [loss for _, loss, _ in trainer.run(rows, minutes=np.inf)]
    assert len(losses) == 4 and losses[-1] < 0.8 * losses[0]
