"""The shipped demo model gives, through the engine, the answers that are known to be right.

`DEMO_QUESTIONS=1000` asks every task all of its questions; by default only addition is.
"""

import json
import os
import random
import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from helpers import quick_start
from safetensors import safe_open
from transformers import AutoTokenizer

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.models.checkpoint import tensor_shapes
from nanovllm_jax.tools.options import DEMO_MODEL
from scripts import demo_data, stories
from scripts.demo_evaluation import complete, wrong_answers

OTHERS = int(os.environ.get("DEMO_QUESTIONS", "100"))
OTHER_TASKS = [task for task in demo_data.TASKS if task != "addition"]


def start(**options):
    """The demo model with one bucket of each kind, optimized: it has many answers to give."""
    with quick_start():
        jax.config.update("jax_disable_most_optimizations", False)
        return LLM(DEMO_MODEL, **options)


@pytest.fixture(scope="module")
def llm():
    sizes = dict(max_model_len=512, max_num_batched_tokens=512, max_num_seqs=64)
    with start(num_kvcache_blocks=140, **sizes) as llm:
        yield llm


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


@pytest.fixture(scope="module")
def recorded():
    """What was measured when the model was trained: exact answers per task, as a share."""
    return json.loads((DEMO_MODEL / "evaluation.json").read_text("utf-8"))


def ask(llm, question, max_tokens):
    """The greedy answer in chat form, and whether it ended by itself."""
    (answer,) = complete(llm, [demo_data.chat_prompt(question)], max_tokens)
    return answer


# ---- answers --------------------------------------------------------------------------------


def test_unseen_additions_are_right(llm):
    wrong = wrong_answers(llm, demo_data.evaluation_set("addition", 1000, seed=1))
    assert len(wrong) <= 10, wrong


@pytest.mark.slow
def test_additions_are_right_with_an_fp8_cache():
    sizes = dict(max_model_len=256, max_num_batched_tokens=256, max_num_seqs=32)
    with start(kv_cache_dtype="fp8", num_kvcache_blocks=64, **sizes) as llm:
        assert llm.runner.state.cache.k.dtype == "float8_e4m3fn"
        wrong = wrong_answers(llm, demo_data.evaluation_set("addition", 200, seed=2))
    assert len(wrong) <= 2, wrong


@pytest.mark.parametrize("task", OTHER_TASKS)
def test_other_tasks_are_as_right_as_when_trained(llm, recorded, task):
    turns = demo_data.evaluation_set(task, 1000, seed=1)[:OTHERS]
    # The first questions may be harder than all thousand: three standard errors.
    share = recorded[task]
    slack = 3 * max(share * (1 - share) / len(turns), 1e-4) ** 0.5
    wrong = wrong_answers(llm, turns)
    assert 1 - len(wrong) / len(turns) >= share - slack, wrong


def test_a_second_turn_is_answered(llm, tokenizer):
    messages = [
        {"role": "user", "content": "What is 12 + 34?"},
        {"role": "assistant", "content": "46"},
        {"role": "user", "content": "What is 100 + 250?"},
    ]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert complete(llm, [prompt], 8) == [("350", True)]


def test_it_says_what_it_is(llm):
    answer, ended = ask(llm, "Who are you?", 64)
    assert ended and "nanovllm_jax demo model" in answer


# ---- stories --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hero", "item"),
    [("fox", "lantern"), pytest.param("owl", "bell", marks=pytest.mark.slow)],
)
def test_a_story_is_english_about_what_was_asked_and_ends(llm, hero, item):
    text, ended = ask(llm, demo_data.story_request(hero, item), 350)
    words = stories.words_of(text)
    known = stories.story_words()
    assert ended
    assert {hero, item} <= set(words)
    assert 60 <= len(words) <= 250
    assert sum(word in known for word in words) >= 0.98 * len(words), text


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
    card = (DEMO_MODEL / "README.md").read_text("utf-8")
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
    assert (
        len(tokenizer) <= json.loads((DEMO_MODEL / "config.json").read_text("utf-8"))["vocab_size"]
    )
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
    told = set()
    for _ in range(500):
        hero, item = rng.choice(stories.KINDS), rng.choice(tuple(stories.OBJECTS))
        story = stories.story(rng, stories.Subject(hero=hero, item=item))
        told.add(story)
        assert {hero, item} <= set(stories.words_of(story))
        assert not re.search(r"[{}\[\]|~¶@]|  | [.,]|\b[Aa] [aeio]|\b[Aa]n (?!hour)[^aeiou]", story)
        assert story[-1] in '.!"'
    assert len(told) == 500


# ---- the training ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def train_demo():
    pytest.importorskip("optax", reason="training needs the extra 'train'")
    from scripts import train_demo

    return train_demo


@pytest.fixture(scope="module")
def trained(train_demo):
    """A tiny model after a few steps, in float32 like the engine that it is compared with.

    Returns its trainer, its tokenizer and the losses on the way.
    """
    recipe = replace(train_demo.TINY, model=replace(train_demo.TINY.model, dtype="float32"))
    tokenizer, trainer = train_demo.train_tokenizer(recipe), train_demo.Trainer(recipe)
    rows = train_demo.make_rows(recipe, tokenizer, workers=1)
    return trainer, tokenizer, [loss for _, loss, _ in trainer.run(rows)]


@pytest.mark.slow
def test_training_lowers_the_loss(trained):
    *_, losses = trained
    assert len(losses) == 4 and losses[-1] < 0.9 * losses[0]


def test_documents_of_a_row_do_not_see_each_other(train_demo, trained):
    trainer, *_ = trained
    tokens = np.random.default_rng(0).integers(3, 500, (2, 40))
    apart = np.stack([tokens, np.zeros_like(tokens), np.full_like(tokens, demo_data.TOLD)], axis=1)
    packed = np.concatenate(list(apart), axis=-1)[None]
    packed[:, 1, 40:] = 1  # the number of the second document
    model = trainer.model(trainer.params)
    loss = jax.jit(lambda rows: train_demo.answer_loss(model, rows, 3.0))
    losses = [float(loss(rows)) for rows in (apart, packed)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


@pytest.mark.slow
def test_an_exported_model_continues_as_the_trained_one_would(
    train_demo, trained, new_engine, tmp_path
):
    trainer, tokenizer, _ = trained
    train_demo.export(tmp_path / "model", trainer, tokenizer)
    with safe_open(tmp_path / "model" / "model.safetensors", "np") as tensors:
        shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    assert shapes == tensor_shapes(trainer.recipe.model)

    prompt = tokenizer.encode("Once upon a time").ids
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    (out,) = new_engine(tmp_path / "model").generate([prompt], params, use_tqdm=False)
    tokens = np.array([*prompt, *out["token_ids"]])
    place = np.arange(len(tokens))
    backend = train_demo.TrainingBackend((place[:, None] >= place)[None])
    model = trainer.model(trainer.params)
    hidden, _ = model(tokens, place, backend)
    best = np.argmax(model.logits(hidden, backend), axis=-1)
    assert out["token_ids"] == best[len(prompt) - 1 : -1].tolist()
