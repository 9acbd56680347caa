"""Outputs that must have a form have it, and nothing else changes, whatever runs beside them."""

import json
import random
import re

import jax
import numpy as np
import pytest
from helpers import quick_start

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.structured_outputs import StructuredOutputsParams
from nanovllm_jax.tools.options import DEMO_MODEL

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{2,6}$"},
        "age": {"type": "integer", "minimum": 3, "maximum": 90},
        "pets": {"type": "array", "items": {"enum": ["cat", "dog"]}, "maxItems": 2},
    },
    "required": ["name", "age", "pets"],
    "additionalProperties": False,
}
FORMS = [
    {"json": PERSON, "disable_any_whitespace": True},
    {"json": json.dumps(PERSON), "disable_any_whitespace": True},
    {"regex": "[0-9]{3}-[a-z]{2,5}"},
    {"choice": ["yes", "no", "perhaps"]},
    {"grammar": 'start: "a" | "bc" start'},
    {"grammar": 'root ::= "a" | "bc" root'},  # llama.cpp's
]
PROMPT = "What is it?"


def has_form(text, form):
    if "json" in form:
        schema = form["json"] if isinstance(form["json"], dict) else json.loads(form["json"])
        value = json.loads(text)
        jsonschema.validate(value, schema)
        return value is not None
    if "choice" in form:
        return text in form["choice"]
    return re.fullmatch(form.get("regex", "(bc)*a"), text) is not None


def params(form, seed=0, **options):
    options = {"temperature": 1.0, "max_tokens": 150, "seed": seed} | options
    return SamplingParams(structured_outputs=form, **options)


def start(**options):
    """The demo model with one bucket of each kind, optimized: it has many steps to take."""
    with quick_start():
        jax.config.update("jax_disable_most_optimizations", False)
        return LLM(
            DEMO_MODEL,
            **{"max_num_seqs": 64, "max_model_len": 512, "max_num_batched_tokens": 512} | options,
        )


@pytest.fixture(scope="module")
def llm():
    with start() as llm:
        yield llm


def ended_by_itself(llm, output):
    return output["token_ids"][-1] in llm.config.model_config.eos_token_ids


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_outputs_have_their_form(llm, temperature):
    asked = [params(form, seed, temperature=temperature) for form in FORMS for seed in range(3)]
    outputs = llm.generate([PROMPT] * len(asked), asked, use_tqdm=False)
    ended = [ended_by_itself(llm, output) for output in outputs]
    assert all(ended[6:12]), "a short form ends by itself"
    for p, output, has_ended in zip(asked, outputs, ended, strict=True):
        assert "error" not in output
        assert not has_ended or has_form(output["text"], p.structured_outputs), output["text"]


def test_neighbours_change_nothing(llm):
    """Alone, and among requests of every kind, in any number of steps a call."""
    others = [SamplingParams(temperature=1.0, max_tokens=40, seed=i) for i in range(6)]
    others += [SamplingParams(temperature=0.7, top_k=5, max_tokens=30, seed=7)]
    forms = [params(form, seed, max_tokens=60) for seed, form in enumerate(FORMS)]
    alone = [llm.generate([PROMPT], p, use_tqdm=False)[0] for p in forms + others]
    together = llm.generate([PROMPT] * len(alone), forms + others, use_tqdm=False)
    assert together == alone


@pytest.mark.parametrize(
    "options",
    [
        {"async_scheduling": False},
        {"num_kvcache_blocks": 3, "max_num_seqs": 6},  # some are preempted
        {"tensor_parallel_size": 2},
        {"mesh_shape": {"data": 2}},
        {"enforce_eager": True, "max_num_seqs": 4},
        {"enable_mixed_chunk": True, "chunked_prefill_size": 64, "max_num_seqs": 4},
    ],
    ids=str,
)
def test_every_way_of_running_gives_the_same(llm, options):
    forms = [params(form, seed, max_tokens=30) for seed, form in enumerate(FORMS)]
    prompts = [f"{PROMPT} {'So ' * 60}" for _ in forms]
    want = llm.generate(prompts, forms, use_tqdm=False)
    with start(**options) as other:
        got = other.generate(prompts, forms, use_tqdm=False)
    assert [o["token_ids"] for o in got] == [o["token_ids"] for o in want]


def test_other_options_narrow_the_form(llm):
    ids = {word: llm.tokenizer.encode(word, add_special_tokens=False) for word in "0123456789"}
    even = [ids[word][0] for word in "02468"] + list(llm.config.model_config.eos_token_ids)
    asked = [
        params({"regex": "[0-9]{8}"}, seed, allowed_token_ids=even, top_k=3, logprobs=2)
        for seed in range(4)
    ]
    for output in llm.generate([PROMPT] * 4, asked, use_tqdm=False):
        assert re.fullmatch("[02468]{8}", output["text"]), output["text"]


def test_a_form_that_other_options_forbid_ends_one_request_only(llm):
    letter = llm.tokenizer.encode("a", add_special_tokens=False)
    wrong = params({"regex": "[0-9]{3}"}, allowed_token_ids=letter)
    right = params({"choice": ["yes", "no"]})
    outputs = llm.generate([PROMPT] * 2, [wrong, right], use_tqdm=False)
    assert "cannot be followed any further" in outputs[0]["error"]
    assert "error" not in outputs[1] and outputs[1]["text"] in ("yes", "no")


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"json": "{"}, "cannot be followed: EOF while parsing"),
        ({"json": {"type": "strange"}}, "Invalid type: strange"),
        ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json": {"minimum": float("nan")}}, "not a JSON schema"),
        ({"json": "3"}, "object schema"),
        ({"regex": "(["}, "unclosed character class"),
        ({"grammar": "((("}, "cannot be followed"),
    ],
    ids=str,
)
def test_forms_that_cannot_be_followed_are_refused_before_any_work(llm, form, message):
    with pytest.raises(ValueError, match=message):
        llm.generate([PROMPT], params(form), use_tqdm=False)


@pytest.mark.parametrize(
    ("form", "error", "message"),
    [
        ({}, ValueError, "not none"),
        ({"json_object": False}, ValueError, "not none"),
        ({"json": "{}", "regex": "a"}, ValueError, "json and regex"),
        ({"choice": []}, ValueError, "not none|at least one"),
        ({"choice": "yes"}, TypeError, "a list of texts"),
        ({"choice": ["yes", 3]}, TypeError, "each choice must be a text, got 3"),
        ({"regex": 3}, TypeError, "regex must be"),
        ({"regex": "\udc80"}, ValueError, "surrogate|Unicode"),
        ({"whitespace_pattern": " "}, TypeError, "say it in a grammar"),
        ({"jsn": "{}"}, TypeError, "jsn"),
        ("[0-9]", TypeError, "must be StructuredOutputsParams or a dict"),
    ],
    ids=str,
)
def test_what_is_no_form_is_refused(form, error, message):
    with pytest.raises(error, match=message):
        SamplingParams(structured_outputs=form)


def test_a_form_decides_the_length():
    with pytest.raises(ValueError, match="min_tokens=3 contradicts structured_outputs"):
        params({"regex": "a+"}, min_tokens=3)


def test_a_form_is_kept_as_it_was_when_the_request_was_made():
    choice, schema = ["yes"], {"type": "string", "enum": ["a"]}
    for name, value in (("choice", choice), ("json", schema)):
        form = SamplingParams(structured_outputs={name: value}).frozen().form
        value.clear()
        assert getattr(form, name) in (("yes",), '{"type": "string", "enum": ["a"]}')
    assert StructuredOutputsParams(regex="a").frozen() == StructuredOutputsParams(regex="a")


# --- Many forms ------------------------------------------------------------------------------


def random_schema(rng, depth=0):
    """A JSON schema of what llguidance follows: objects, arrays, enums, patterns, limits."""
    kinds = ["string", "pattern", "integer", "number", "boolean", "enum", "const", "null"]
    kinds += ["object", "object", "array", "any of"] if depth < 3 else []
    kind = "object" if depth == 0 else rng.choice(kinds)
    low = rng.randrange(-40, 40)
    if kind == "object":
        names = rng.sample(["id", "name", "x y", "größe", "n", "ok", "list"], rng.randint(1, 4))
        return {
            "type": "object",
            "properties": {name: random_schema(rng, depth + 1) for name in names},
            "required": names[: rng.randint(0, len(names))],
            "additionalProperties": False,
        }
    if kind == "array":
        least = rng.randrange(3)
        size = {"minItems": least, "maxItems": least + rng.randrange(3)}
        return {"type": "array", "items": random_schema(rng, depth + 1), **size}
    if kind == "any of":
        return {"anyOf": [random_schema(rng, depth + 1) for _ in range(2)]}
    return {
        "string": {"type": "string", "minLength": rng.randrange(3), "maxLength": 3 + low % 5},
        "pattern": {"type": "string", "pattern": rng.choice(PATTERNS)},
        "integer": {"type": "integer", "minimum": low, "maximum": low + rng.randrange(300)},
        "number": {"type": "number", "exclusiveMinimum": low, "maximum": low + 5.5},
        "boolean": {"type": "boolean"},
        "enum": {"enum": rng.sample(["red", "a b", 7, -1.5, True, None, "ü"], 3)},
        "const": {"const": rng.choice(["fixed", 3, False])},
        "null": {"type": "null"},
    }[kind]


PATTERNS = ["^[a-f0-9]{4}$", "^(yes|no)$", "^[A-Z][a-z]+ [0-9]?$", "^a*b{1,3}$", "^[^,;]{2,4}$"]


def random_regex(rng, depth=0):
    atom = rng.choice(["[a-z]", "[0-9]", "x", "ab", "[A-F]", "[^a-m ]", "-", "é"])
    if depth < 2 and rng.random() < 0.5:
        inner = "|".join(random_regex(rng, depth + 1) for _ in range(rng.randint(1, 3)))
        atom = f"({inner})"
    atom += rng.choice(["", "", "?", "{2}", "{1,3}"])
    return atom + (random_regex(rng, depth) if rng.random() < 0.5 else "")


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_random_schemas(llm, part):
    """250 of them: every output that ended by itself is valid, and most end."""
    rng = random.Random(part)
    schemas = [random_schema(rng) for _ in range(250)]
    asked = [
        params({"json": s, "disable_any_whitespace": True}, seed, max_tokens=100)
        for seed, s in enumerate(schemas)
    ]
    outputs = llm.generate([PROMPT] * len(asked), asked, use_tqdm=False)
    ended = [ended_by_itself(llm, output) for output in outputs]
    assert np.mean(ended) > 0.7
    for schema, output, has_ended in zip(schemas, outputs, ended, strict=True):
        assert "error" not in output, output["error"]
        if has_ended:
            jsonschema.validate(json.loads(output["text"]), schema)


@pytest.mark.slow
def test_random_regexes(llm):
    rng = random.Random(0)
    regexes = [random_regex(rng) for _ in range(50)]
    asked = [params({"regex": r}, seed, max_tokens=60) for seed, r in enumerate(regexes)]
    outputs = llm.generate([PROMPT] * len(asked), asked, use_tqdm=False)
    ended = [ended_by_itself(llm, output) for output in outputs]
    assert sum(ended) > 40
    for regex, output, has_ended in zip(regexes, outputs, ended, strict=True):
        assert not has_ended or re.fullmatch(regex, output["text"]), (regex, output["text"])
