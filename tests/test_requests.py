"""What a request may be, what is refused and in which words, and which random stream it has."""

import copy
import inspect
import itertools
import pickle
import subprocess
import sys
from dataclasses import fields, replace

import helpers
import jax
import numpy as np
import pytest
from helpers import VOCAB, Spy, greedy, prompt, tokens
from tokenizers import Tokenizer, decoders, processors
from tokenizers.models import Unigram
from transformers import BatchEncoding, PreTrainedTokenizerFast

from nanovllm_jax import SamplingParams
from nanovllm_jax.engine.commands import AddRequest, decode, encode
from nanovllm_jax.engine.prompts import encode_chat
from nanovllm_jax.engine.request import stream_seed


@pytest.fixture
def llm(fake_engine):
    """An engine with a tokenizer of one character a token, whose EOS is token 0."""
    return fake_engine()


# --- prompts of every kind ---

IDS = [5, 6, 7]


@pytest.mark.parametrize(
    "same",
    [
        tuple(IDS),
        range(5, 8),
        [np.int64(5), np.uint8(6), 7],
        np.array(IDS),
        np.array(IDS, np.uint16),
        jax.numpy.array(IDS),
        {"prompt_token_ids": IDS},
        {"prompt_token_ids": np.array(IDS), "prompt": "shown"},
        {"prompt_token_ids": jax.numpy.array(IDS), "prompt": None},
    ],
    ids=repr,
)
def test_token_ids_may_come_in_many_forms(llm, same):
    assert tokens(llm, [same], greedy()) == tokens(llm, [IDS], greedy())
    llm.add_request(same, greedy(1))
    (output,) = llm.step_outputs()
    assert output.prompt_token_ids == IDS and {*map(type, output.prompt_token_ids)} == {int}
    assert output.prompt == (same.get("prompt") if isinstance(same, dict) else None)


def test_a_text_may_come_in_a_dict(llm):
    assert tokens(llm, [{"prompt": "abc"}], greedy()) == tokens(llm, ["abc"], greedy())


def test_jax_arrays_are_read_under_a_transfer_guard(llm):
    want = tokens(llm, [IDS, IDS], greedy())
    arrays = [jax.numpy.array(IDS), jax.numpy.array([IDS, IDS])]
    with jax.transfer_guard("disallow"):
        assert tokens(llm, [arrays[0]] * 2, greedy()) == want
        assert tokens(llm, arrays[1], greedy()) == want


def test_prompts_may_be_any_iterable(llm):
    prompts = [IDS, "abc"]
    want = tokens(llm, prompts, greedy())
    assert tokens(llm, iter(prompts), greedy()) == want
    assert tokens(llm, (p for p in prompts), (greedy() for _ in prompts)) == want
    assert tokens(llm, dict.fromkeys("ab", IDS).values(), greedy()) == [want[0]] * 2
    assert tokens(llm, np.array([IDS, IDS]), greedy()) == [want[0]] * 2, "a row each"


def test_without_sampling_params_the_defaults_count(llm):
    (default,) = llm.generate([IDS], use_tqdm=False)
    assert len(default["token_ids"]) <= SamplingParams().max_tokens == 64
    llm.generate([IDS], None, use_tqdm=False)
    assert llm.generate([], None) == []


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("abc", r"got 'abc'; pass \[prompt\]"),
        (b"abc", r"pass \[prompt\]"),
        ({"prompt": "abc"}, r"pass \[prompt\]"),
        ([1, 2, 3], r"got token ids; pass \[token_ids\]"),
        (np.array([1, 2]), r"got token ids; pass \[token_ids\]"),
        (jax.numpy.array([1, 2]), r"got token ids; pass \[token_ids\]"),
        (None, "list of prompts, got None"),
        (5, "list of prompts, got 5"),
    ],
)
def test_one_prompt_is_no_list_of_prompts(llm, prompts, message):
    with pytest.raises(TypeError, match=message):
        llm.generate(prompts, greedy())
    assert llm.is_finished()


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ("", ValueError, "empty; pass at least one token"),
        (np.array([], int), ValueError, "empty"),
        ("ab\ud800c", ValueError, r"'\\ud800' at position 2 is a lone surrogate; decode bytes"),
        ({"prompt": "\udcff"}, ValueError, "at position 0 is a lone surrogate"),
        (b"abc", TypeError, r"bytes; pass text: prompt\.decode\(\)"),
        (b"ab\xffc", ValueError, r"'\\udcff' at position 2 is a lone surrogate; decode bytes by"),
        (np.array([[1, 2]]), TypeError, r"one dimension.*shape \(1, 2\); pass each row"),
        (np.array(5), TypeError, "one dimension"),
        (np.array([1.0]), TypeError, "float64"),
        (jax.numpy.array([1.0]), TypeError, "float32"),
        (np.array([True]), TypeError, "bool"),
        ([1, True], TypeError, "token ids must be integers, got True at position 1"),
        ([1, "a"], TypeError, "got 'a' at position 1"),
        ([[1, 2]], TypeError, r"got \[1, 2\] at position 0"),
        ({1, 2}, TypeError, "token ids"),
        pytest.param(iter([1, 2]), TypeError, "a string or a list of token ids", id="an iterator"),
        ({}, TypeError, r"'prompt' or 'prompt_token_ids'.* keys \[\]"),
        ({"prompt": [1]}, TypeError, "'prompt' must be a string"),
        ({"prompt_token_ids": "abc"}, TypeError, "'prompt_token_ids' must be a list"),
        ({"prompt": "a", "multi_modal_data": {"image": 1}}, TypeError, "multi_modal_data"),
        (BatchEncoding({"input_ids": [1]}), TypeError, "pass its 'input_ids' alone"),
        ([2**70], ValueError, f"{2**70} is not in the vocabulary of {VOCAB}; is it of another"),
        ([1] * 768, ValueError, "max_model_len=768; shorten the prompt or raise it.* to 2048"),
    ],
    ids=repr,
)
def test_a_refused_prompt_is_named_by_its_index(llm, bad, error, message):
    with pytest.raises(error, match=rf"(?s)^prompts\[2\]: .*{message}"):
        llm.generate(["a", IDS, bad, "b"], greedy(), use_tqdm=False)
    with pytest.raises(error, match=message):
        llm.add_request(bad, greedy())
    assert llm.is_finished()


def test_a_prompt_too_long_for_the_cache_is_told_what_helps(fake_engine):
    llm = fake_engine(num_kvcache_blocks=2)
    remedy = "shorten the prompt, or raise num_kvcache_blocks or gpu_memory_utilization"
    with pytest.raises(ValueError, match=rf"^prompts\[0\]: .*needs 3 blocks.* has 2; {remedy}"):
        llm.generate([prompt(513)], greedy())


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"temperature": 0}, TypeError, r"SamplingParams or a list of them, got \{'temp"),
        ("greedy", TypeError, "SamplingParams or a list"),
        (5, TypeError, "SamplingParams or a list"),
        ([SamplingParams(), None], TypeError, r"prompts\[1\]: sampling_params must be Sampling"),
        ([], ValueError, "2 prompts and 0 sampling_params"),
    ],
)
def test_sampling_params_of_another_kind_are_refused(llm, wrong, error, message):
    with pytest.raises(error, match=message):
        llm.generate(["a", "b"], wrong)
    assert llm.is_finished()


@pytest.mark.parametrize("token", [VOCAB, 2**40])
def test_a_stop_token_that_cannot_come_is_refused(llm, token):
    with pytest.raises(ValueError, match=rf"stop_token_ids: token id {token} is not in the voc"):
        llm.generate(["a"], greedy(stop_token_ids=[1, token]))


def test_max_tokens_none_goes_on_to_max_model_len(llm):
    (out,) = tokens(llm, [prompt(700)], greedy(None, ignore_eos=True))
    assert len(out) == 68


# --- options in NumPy's numbers ---


def test_numpys_numbers_are_taken_and_travel_as_pythons():
    """They come from arrays of settings; the other processes of an engine are sent JSON."""
    numpy = SamplingParams(
        temperature=np.float32(0.5), max_tokens=np.int64(9), top_k=np.int32(3), top_p=np.float64(1),
        min_p=np.float16(0), seed=np.uint64(2**64 - 1), ignore_eos=np.True_,
        stop_token_ids=np.array([1, 2]), detokenize=np.True_, n=np.uint8(2), stop=np.array(["a"]),
        include_stop_str_in_output=np.False_, truncate_prompt_tokens=np.int16(5),
        min_tokens=np.int8(1), presence_penalty=np.float32(0.5),
        logit_bias={np.int64(3): np.float32(0.25)}, allowed_token_ids=np.array([4, 5]),
        bad_words=np.array(["no"]), logprobs=np.int64(2), prompt_logprobs=np.uint8(0),
    )  # fmt: skip
    python = SamplingParams(
        0.5, 9, True, 3, 1.0, 0.0, 2**64 - 1, frozenset([1, 2]), n=2, stop=("a",),
        truncate_prompt_tokens=5, min_tokens=1, presence_penalty=0.5, logit_bias={3: 0.25},
        allowed_token_ids=(4, 5), bad_words=("no",), logprobs=2, prompt_logprobs=0,
    )  # fmt: skip
    assert numpy.changes_logits and numpy.frozen() == python
    assert {type(value) for value in vars(numpy.frozen()).values()} == {
        float, int, bool, frozenset, dict, tuple, type(None)
    }  # fmt: skip
    (sent,) = decode(encode([AddRequest([1], numpy.frozen())]))
    lists = {"stop_token_ids": None, "stop": None}
    assert replace(sent.params, **lists) == replace(python, **lists)
    assert {*sent.params.stop_token_ids} == {1, 2} and sent.params.stop_strings == ("a",)


def test_a_request_keeps_its_stop_tokens_when_the_users_list_changes(llm):
    (free,) = tokens(llm, [IDS], greedy(20, ignore_eos=True))
    stop = [free[5]]
    llm.add_request(IDS, greedy(20, ignore_eos=True, stop_token_ids=stop))
    stop.clear()
    (out,) = [ids for _ in range(30) for _, ids in llm.step()[0]]
    assert out == free[: free.index(free[5]) + 1]


# --- unknown options of SamplingParams ---


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("temprature", "option 'temprature'; did you mean 'temperature'"),
        ("max_new_tokens", "did you mean 'max_tokens'"),
        ("best_of", "which vLLM has: n completions are drawn, and all of them returned"),
        ("spaces_between_special_tokens", "which vLLM has: the tokenizer alone puts spaces"),
        ("length_penalty", "which vLLM has: completions are drawn one by one"),
        ("flat_logprobs", "which vLLM has: use logprobs, which gives dicts"),
        ("xyzzy", r"option 'xyzzy'\. Valid: .*'temperature'"),
    ],
)
def test_sampling_params_explain_unknown_names(wrong, message):
    for make in (SamplingParams, lambda **options: replace(SamplingParams(), **options)):
        with pytest.raises(TypeError, match=rf"^SamplingParams\(\) has .*{message}"):
            make(**{wrong: 1})


def test_sampling_params_are_a_dataclass_like_any_other():
    params = SamplingParams(0.5, seed=3)
    again = [copy.copy(params), copy.deepcopy(params), pickle.loads(pickle.dumps(params))]
    assert again == [params] * 3 and replace(params, seed=4).seed == 4
    assert [*inspect.signature(SamplingParams).parameters] == [f.name for f in fields(params)]
    with pytest.raises(TypeError):
        SamplingParams(*range(10))
    with pytest.raises(AttributeError):
        params.seed = 5


# --- text ---

WORDS = ["▁", "▁a", "b", "é", "▁hello", "▁.", "▁don", "'t", "[INST]"]


@pytest.fixture
def llama(fake_engine, checkpoint, tmp_path, monkeypatch):
    """An engine with a tokenizer as Llama 2 has it: it adds <s>, and decodes "▁a" to " a"."""
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    made = Tokenizer(Unigram([(word, -1.0) for word in vocab], unk_id=0, byte_fallback=True))
    made.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=made, **names)
    fast.chat_template = "{{ bos_token }}{% for m in messages %}[INST]{{ m.content }}{% endfor %}"
    path = tmp_path / "llama"
    helpers.make_checkpoint(path, vocab_size=len(vocab))
    fast.save_pretrained(path)
    monkeypatch.setattr(helpers.FakeRunner, "vocab", len(vocab))
    return fake_engine(path)


def test_a_streams_parts_joined_are_the_text_of_generate(llama):
    """A special token in the middle once took the space after it along."""
    sampling = [SamplingParams(seed=i, max_tokens=60, ignore_eos=True) for i in range(20)]
    stops = [p for p in sampling if p.seed % 2] + [
        replace(p, ignore_eos=False) for p in sampling if not p.seed % 2
    ]
    want = [output["text"] for output in llama.generate([IDS] * 20, stops, use_tqdm=False)]
    for params, text in zip(stops, want, strict=True):
        llama.add_request(IDS, params)
        texts = [""]
        while not llama.is_finished():
            texts += [output.outputs[0].text for output in llama.step_outputs()]
        assert all(later.startswith(text) for text, later in itertools.pairwise(texts))
        assert texts[-1] == text


def test_a_chat_prompt_is_encoded_once_without_a_second_bos(llama):
    messages = [{"role": "user", "content": "b"}]
    text = llama.tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<s>[INST]b" and llama.tokenizer.encode(text)[:2] == [1, 1]
    ids = [1, *llama.tokenizer.convert_tokens_to_ids(["[INST]", "b"])]
    assert encode_chat(llama.tokenizer, messages) == ids
    for given in (text, ids, "[INST]b"):
        llama.add_request(given, greedy(1))
        assert llama.step_outputs()[0].prompt_token_ids == ids
    llama.add_request("<s>" + text, greedy(1))
    assert llama.step_outputs()[0].prompt_token_ids == [1, *ids], "a second one of the user's own"
    assert llama.chat(messages, greedy()) == llama.generate([ids], greedy())


@pytest.mark.parametrize(
    ("messages", "error", "message"),
    [
        ([[{"role": "user", "content": "a"}], []], TypeError, r"^messages\[1\]: "),
        ([[{"role": "user", "content": "a"}], "b"], TypeError, r"^messages\[1\]: .*got 'b'"),
        (["hi"], TypeError, r"^messages: a message must be a dict"),
        ([{"content": "hi"}], TypeError, "'role'"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], TypeError, "be a text"),
        ([{"role": "user", "content": "a\ud800"}], ValueError, "^messages: .*lone surrogate"),
    ],
)
def test_a_conversation_that_no_template_can_write_is_refused(llm, messages, error, message):
    with pytest.raises(error, match=message):
        llm.chat(messages, greedy())
    assert llm.is_finished()


def test_what_a_template_refuses_is_told(llm):
    refusing = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"^messages: the chat template.*roles must alternate"):
        llm.chat([{"role": "user", "content": "a"}], greedy(), chat_template=refusing)


# --- random streams ---


def test_two_prompts_under_one_seed_have_streams_of_their_own(engine):
    """vLLM draws the same token for each: 200 different prompts gave one token."""
    llm = engine()
    params = SamplingParams(temperature=50, seed=7, max_tokens=1, ignore_eos=True)
    prompts = [[i % VOCAB, i // VOCAB] for i in range(200)]
    drawn = [out[0] for out in tokens(llm, prompts, params)]
    assert len({*drawn}) > 80, "of 131 tokens, 103 are expected"
    assert tokens(llm, prompts[::-1], params) == [[token] for token in drawn[::-1]]


@pytest.mark.parametrize("beyond", [{"top_p": 1e-300}, {"top_p": 1e-40}, {"temperature": 1e-40}])
def test_options_too_small_for_float32_leave_the_likeliest(engine, beyond):
    """A top_p that became 0 on the device kept no token, and token 0 was drawn."""
    llm = engine()
    params = SamplingParams(**beyond, max_tokens=10, ignore_eos=True)
    prompts = [prompt(9, seed=s) for s in range(4)]
    assert tokens(llm, prompts, params) == tokens(llm, prompts, greedy(10, ignore_eos=True))


@pytest.mark.parametrize("temperature", [1e37, 1e39, 1e300, 10**400])
def test_the_highest_temperatures_draw_alike(engine, temperature):
    llm = engine()
    drawn = [
        tokens(llm, [IDS], SamplingParams(t, 40, True, seed=1))[0] for t in (1e30, temperature)
    ]
    assert drawn[0] == drawn[1] and len({*drawn[0]}) > 20


def test_a_stream_depends_on_nothing_but_seed_and_prompt():
    same = {stream_seed(7, IDS, engine, number) for engine in (0, 1) for number in (0, 9)}
    assert len(same) == 1
    others = {
        stream_seed(7, [*IDS, 0], 0, 0),
        stream_seed(8, IDS, 0, 0),
        stream_seed(-7, IDS, 0, 0),
    }
    assert len(same | others) == 4
    assert stream_seed(-1, IDS, 3, 4) == stream_seed(None, IDS, 3, 4), "-1 is no seed, as in vLLM"
    assert stream_seed(None, IDS, 3, 4) == stream_seed(None, [9], 3, 4)
    assert all(0 <= seed < 2**64 for seed in same | others)


def test_a_preempted_request_keeps_its_stream(fake_engine, monkeypatch):
    params = SamplingParams(seed=7, max_tokens=300, ignore_eos=True)
    prompts = [prompt(250), prompt(251)]
    want = tokens(fake_engine(), prompts, params)
    llm = fake_engine(num_kvcache_blocks=3)
    spy = Spy(llm, monkeypatch)
    assert tokens(llm, prompts, params) == want
    assert spy.preempted


def test_engines_of_neighbouring_seeds_have_different_streams(fake_engine):
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    outputs = [
        out for seed in (0, 1, 2) for out in tokens(fake_engine(seed=seed), [IDS] * 9, params)
    ]
    assert len({*map(tuple, outputs)}) == 27


# --- python -O ---


def test_refusals_do_not_need_asserts():
    code = (
        "from nanovllm_jax.config import EngineConfig\n"
        "try: EngineConfig.resolve('Qwen/Qwen3-0.6B')\n"
        "except AssertionError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, encoding="utf-8")
    assert "hf download Qwen/Qwen3-0.6B --local-dir DIR" in done.stdout, done.stderr
