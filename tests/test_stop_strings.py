"""Stop strings: where a text is cut, and what is shown of it meanwhile."""

import itertools
import random
from dataclasses import replace

import pytest
from helpers import FakeRunner, Spy, drain, greedy, prompt, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm_jax import SamplingParams
from nanovllm_jax.engine.completion import Completion
from nanovllm_jax.engine.sequence import Sequence, Status
from nanovllm_jax.engine.stop_strings import StopStrings


def cut(text, strings, include):
    """The text up to where, character by character, it first ends with one of the strings."""
    for end in range(1, len(text) + 1):
        ending = [s for s in strings if text[:end].endswith(s)]
        if ending:
            found = max(ending, key=len)
            return text[: end if include else end - len(found)], found
    return text, None


@settings(max_examples=2000, deadline=None, derandomize=True)
@given(
    st.text("ab", max_size=24),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
    st.sets(st.integers(0, 24)),
    st.booleans(),
)
def test_a_text_is_cut_at_the_first_stop_string_however_it_comes(text, strings, cuts, include):
    stop, shown = StopStrings(strings, include), ""
    edges = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    want, found = cut(text, strings, include)
    for start, end in itertools.pairwise(edges):
        shown += stop.push(text[start:end])
        assert want.startswith(shown), "what is shown is never taken back"
        if stop.found is None:
            known = text[:end]
            beginnings = [s[:i] for s in strings for i in range(1, len(s)) if known.endswith(s[:i])]
            assert known == shown + max(beginnings, key=len, default=""), "no more is held back"
    shown += stop.flush()
    assert (shown, stop.found) == (want, found)
    if not include:
        assert not any(s in shown for s in strings)


# --- in an engine: one character a token, and tokens that are checksums ---


@pytest.fixture(autouse=True)
def _printable(monkeypatch):
    """Have all tokens but the end token stand for a printable character."""
    monkeypatch.setattr(FakeRunner, "vocab", 95)


@pytest.fixture
def llm(fake_engine):
    return fake_engine()


FREE = {"seed": 0, "max_tokens": 100, "ignore_eos": True}
IDS = [5, 6, 7]


def free_text(llm):
    """A hundred characters, and as many tokens."""
    (free,) = llm.generate([IDS], SamplingParams(**FREE), use_tqdm=False)
    assert len(free["text"]) == len(free["token_ids"]) == 100, "choose another seed"
    return free["text"], free["token_ids"]


def outputs_of(llm, params):
    """Every output of one request."""
    llm.add_request(IDS, params)
    outputs = []
    while not llm.is_finished():
        outputs += llm.step_outputs()
    return outputs


def plain_end(llm):
    """A string that the text has only once, and where it ends."""
    text, _ = free_text(llm)
    string = text[60:63]
    assert text.find(string) == 60
    return string, 63


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("as_list", [False, True])
def test_a_stop_string_over_several_tokens_ends_the_request(llm, include, as_list):
    text, ids = free_text(llm)
    string, end = plain_end(llm)
    stop = ["never there", string] if as_list else string
    params = SamplingParams(**FREE, stop=stop, include_stop_str_in_output=include)
    outputs = outputs_of(llm, params)
    last = outputs[-1].outputs[0]
    assert last.text == text[: end if include else end - 3]
    assert last.token_ids == ids[:end], "up to the token that completed it, and no further"
    assert (last.finish_reason, last.stop_reason) == ("stop", string) and outputs[-1].finished
    shown = [output.outputs[0].text for output in outputs]
    assert all(last.text.startswith(text) for text in shown), "half a stop string was shown"
    assert {output.outputs[0].stop_reason for output in outputs[:-1]} == {None}
    (result,) = llm.generate([IDS], params, use_tqdm=False)
    assert result == {"text": last.text, "token_ids": last.token_ids}
    assert [*itertools.chain(*llm.stream(IDS, params))] == last.token_ids
    llm.pools[0].check([])


def test_calls_of_several_steps_drop_the_tokens_after_the_cut(fake_engine, monkeypatch):
    llm = fake_engine(num_scheduler_steps=7)
    text, ids = free_text(llm)
    spy = Spy(llm, monkeypatch)
    for end in range(60, 67):  # the cut falls on every step of a call
        string = text[end - 5 : end]
        (result,) = llm.generate([IDS], SamplingParams(**FREE, stop=string), use_tqdm=False)
        assert result["token_ids"] == ids[: text.find(string) + 5]
    assert 7 in spy.num_steps


def test_a_stop_string_that_comes_with_the_last_token_wins(llm):
    string, end = plain_end(llm)
    params = SamplingParams(**FREE | {"max_tokens": end}, stop=string)
    last = outputs_of(llm, params)[-1].outputs[0]
    assert (last.finish_reason, last.stop_reason) == ("stop", string)
    params = SamplingParams(**FREE | {"max_tokens": end - 1}, stop=string)
    last = outputs_of(llm, params)[-1].outputs[0]
    assert (last.finish_reason, last.stop_reason) == ("length", None)
    assert last.text == free_text(llm)[0][: end - 1], "what was held back is given out"


def test_an_end_token_has_no_text_unless_asked(llm):
    text, ids = free_text(llm)
    end = ids.index(ids[40])
    for include in (False, True):
        options = {"stop_token_ids": [ids[40]], "include_stop_str_in_output": include}
        last = outputs_of(llm, SamplingParams(**FREE, **options))[-1].outputs[0]
        assert last.token_ids == ids[: end + 1] and last.stop_reason == ids[40]
        assert last.text == text[: end + include]


def test_an_end_token_that_is_read_while_the_request_ends_has_no_text(llm):
    """The engine's thread adds the token and then ends the sequence; an output may come between."""
    params = SamplingParams(skip_special_tokens=False)
    seq = Sequence(0, IDS, params, seed=0, max_tokens=9)
    completion = Completion(seq, llm.tokenizer)
    seq.token_ids += llm.tokenizer.encode("ab")
    assert completion.output().text == "ab"
    seq.finish_reason = "stop"
    seq.token_ids.append(llm.tokenizer.eos_token_id)
    for status in (Status.RUNNING, Status.FINISHED):
        seq.status = status
        output = completion.output()
        assert output.text == "ab"
        assert (output.finish_reason is None) == (len(output.token_ids) == 2)
    assert len(output.token_ids) == 3


def test_special_tokens_are_kept_if_asked(llm):
    params = [
        SamplingParams(seed=seed, max_tokens=300, skip_special_tokens=False, ignore_eos=on)
        for on in (True, False)
        for seed in range(8)
    ]
    outputs = llm.generate([prompt(7)] * 16, params, use_tqdm=False)
    kept, ended = outputs[:8], outputs[8:]
    assert any("<end>" in output["text"] for output in kept)
    for output in kept:
        assert output["text"] == llm.tokenizer.decode(output["token_ids"])
    assert not any("<end>" in output["text"] for output in ended), "the one that ends is no text"


def test_an_aborted_request_gives_out_what_was_held_back(llm):
    text, _ = free_text(llm)
    llm.add_request(IDS, SamplingParams(**FREE, stop=text[:20] + "!"))
    for _ in range(10):
        outputs = llm.step_outputs()
    assert outputs[0].outputs[0].text == ""
    llm.abort_request(outputs[0].request_id)
    (last,) = llm.step_outputs()
    completion = last.outputs[0]
    assert completion.text == text[: len(completion.token_ids)] and completion.token_ids
    assert completion.finish_reason == "abort"


def test_a_preempted_request_finds_its_stop_string(fake_engine, monkeypatch):
    free = SamplingParams(seed=1, max_tokens=300, ignore_eos=True)
    prompts = [prompt(250), prompt(251)]
    texts = [out["text"] for out in fake_engine().generate(prompts, free, use_tqdm=False)]
    params = [replace(free, stop=text[200:204]) for text in texts]
    llm = fake_engine(num_kvcache_blocks=3)
    spy = Spy(llm, monkeypatch)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output["text"] for output in outputs] == [text[:200] for text in texts]
    assert spy.preempted


@pytest.mark.parametrize("skip", [True, False])
def test_random_requests_are_cut_exactly(fake_engine, monkeypatch, skip):
    """Among them are halves of characters, special tokens, and stop strings of all that."""
    monkeypatch.setattr(FakeRunner, "vocab", 131)
    llm, rng = fake_engine(num_scheduler_steps=3), random.Random(5)
    options = {"max_tokens": 80, "ignore_eos": True, "skip_special_tokens": skip}
    params = [SamplingParams(seed=seed, n=2, **options) for seed in range(40)]
    free = llm.generate([IDS] * 40, params, use_tqdm=False)
    for i, result in enumerate(free):
        text, starts = result["text"], rng.sample(range(75), 2)
        stop = [text[start : start + rng.randrange(1, 5)] or "x" for start in starts]
        include = rng.random() < 0.3
        params[i] = replace(params[i], stop=stop, include_stop_str_in_output=include)
    ended = 0
    for output, result, param in zip(
        llm.generate_outputs([IDS] * 40, params, use_tqdm=False), free, params, strict=True
    ):
        for got, whole in zip(output.outputs, result["outputs"], strict=True):
            text, found = cut(whole["text"], param.stop, param.include_stop_str_in_output)
            assert (got.text, got.stop_reason) == (text, found)
            count = len(got.token_ids)
            assert got.token_ids == whole["token_ids"][:count]
            assert got.finish_reason == ("stop" if found else "length")
            earlier = llm.tokenizer.decode(got.token_ids[:-4], skip_special_tokens=skip)
            assert not found or count < 4 or not any(s in earlier[:-1] for s in param.stop)
            ended += found is not None
    assert 40 < ended < 80


def test_other_requests_are_not_decoded_in_the_engines_thread(llm):
    """Their tokens become text when somebody asks; a long batch would hold the device up."""
    llm.add_request(IDS, greedy())
    assert llm.scheduler.waiting[0].find_stop_string is None
    drain(llm)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"stop": 5}, TypeError, "stop must be a string or a list of strings, got 5"),
        ({"stop": b"x"}, TypeError, "stop must be a string"),
        ({"stop": ["a", 5]}, TypeError, "each of stop must be a string, got 5"),
        ({"stop": ""}, ValueError, "no empty string"),
        ({"stop": ["a", ""]}, ValueError, "no empty string"),
        ({"stop": "a", "detokenize": False}, ValueError, "leave detokenize at True, or use stop_t"),
        ({"include_stop_str_in_output": 1}, TypeError, "include_stop_str_in_output must be True"),
        ({"skip_special_tokens": None}, TypeError, "skip_special_tokens must be True or False"),
    ],
)
def test_bad_stop_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        SamplingParams(**options)


def test_stop_strings_need_a_tokenizer(fake_engine, checkpoint):
    llm = fake_engine(checkpoint())
    with pytest.raises(ValueError, match=r"stop='a' needs a tokenizer.*use stop_token_ids"):
        llm.generate([IDS], SamplingParams(stop="a"), use_tqdm=False)


# --- prompts that are cut ---


@pytest.mark.parametrize(
    ("last", "max_tokens", "kept"),
    [(5, 3, 5), (600, 3, 600), (-1, 3, 765), (-1, None, 767), (-1, 5000, 767), (None, 3, None)],
)
def test_the_end_of_a_long_prompt_is_kept(llm, last, max_tokens, kept):
    ids = prompt(900)
    params = greedy(max_tokens, truncate_prompt_tokens=last)
    if kept is None:
        with pytest.raises(ValueError, match="900 tokens"):
            llm.generate([ids], params, use_tqdm=False)
        return
    assert tokens(llm, [ids], params) == tokens(llm, [ids[-kept:]], greedy(max_tokens))
    llm.add_request(ids, params)
    assert llm.step_outputs()[0].prompt_token_ids == ids[-kept:]
    drain(llm)
    assert tokens(llm, [ids[:4]], params) == tokens(llm, [ids[:4]], greedy(max_tokens))
    text = "abc" * 300
    llm.add_request(text, params)
    output = llm.step_outputs()[0]
    assert output.prompt == text and len(output.prompt_token_ids) == kept
    drain(llm)


@pytest.mark.parametrize("wrong", [0, -2])
def test_a_prompt_is_cut_to_at_least_a_token(wrong):
    with pytest.raises(ValueError, match=rf"truncate_prompt_tokens must be .*, got {wrong}"):
        SamplingParams(truncate_prompt_tokens=wrong)
