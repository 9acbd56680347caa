"""What a request can ask for beside filters, through the engine: tokens and scores as they must be.

The oracle is transformers with the processors of the same meaning; presence and frequency
penalties, which it lacks, are written here by vLLM's formulas.
"""

import itertools
import math

import numpy as np
import pytest
from helpers import BLOCK, NEW, Spy, edge_prompts, greedy, poison, prompt, tokens

from nanovllm_jax import SamplingParams
from nanovllm_jax.engine import commands, programs, step
from nanovllm_jax.engine.edits import Edit
from nanovllm_jax.outputs import Logprob

TINY_POOL = {"num_kvcache_blocks": 4}
CHUNKED = {"max_model_len": 640, "max_num_batched_tokens": 640}
MIXED = CHUNKED | {"chunked_prefill_size": 100, "enable_mixed_chunk": True}
MESHES = [{"tensor_parallel_size": 2}, {"mesh_shape": {"data": 2}}]
MESHES += [{"mesh_shape": {"data": 2, "tensor": 2}}]


class Oracle:
    """transformers' model of a checkpoint."""

    def __init__(self, path):
        self.torch = pytest.importorskip("torch")
        self.transformers = pytest.importorskip("transformers")
        load = self.transformers.AutoModelForCausalLM.from_pretrained
        self.model = load(path, dtype=self.torch.float32).eval()

    def generate(self, ids, max_tokens=NEW, **options):
        """Greedy tokens, and the log probabilities before any processor, [tokens, V]."""
        torch = self.torch
        out = self.model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones((1, len(ids)), dtype=torch.int64),
            max_new_tokens=max_tokens,
            do_sample=False,
            output_logits=True,
            output_scores=True,
            return_dict_in_generate=True,
            pad_token_id=0,
            **({"eos_token_id": None} | options),
        )
        best = torch.stack(out.scores).squeeze(1).topk(2).values
        margin = (best[:, 0] - best[:, 1]).min().item()
        assert margin > 1e-4, f"a tie in the oracle ({margin}): choose another prompt"
        logprobs = torch.stack(out.logits).squeeze(1).log_softmax(-1).numpy()
        return out.sequences[0, len(ids) :].tolist(), logprobs

    def prompt_logprobs(self, ids):
        """The log probabilities that follow each token, [tokens, V]."""
        with self.torch.no_grad():
            logits = self.model(self.torch.tensor([ids])).logits[0]
        return logits.log_softmax(-1).numpy()

    def occurrence_penalties(self, num_prompt, presence, frequency):
        torch, transformers = self.torch, self.transformers

        class Penalties(transformers.LogitsProcessor):
            def __call__(self, input_ids, scores):
                scores = scores.clone()  # the oracle keeps what it was given as the raw logits
                for row, ids in enumerate(input_ids):
                    counts = torch.bincount(ids[num_prompt:], minlength=scores.shape[1])
                    scores[row] -= frequency * counts + presence * (counts > 0)
                return scores

        return transformers.LogitsProcessorList([Penalties()])


@pytest.fixture(scope="module")
def oracle_of(checkpoint):
    """oracle_of(shape) -> the Oracle of a checkpoint with a tokenizer."""
    made = {}

    def get(shape):
        if shape not in made:
            made[shape] = Oracle(checkpoint(shape, tokenizer=True))
        return made[shape]

    return get


class Case:
    """A request's options, and what the oracle is told in their place."""

    def __init__(self, oracle, ids, kinds, ends):
        self.ids, self.options = ids, {}
        self.theirs = {"eos_token_id": sorted(ends)}
        plain, _ = oracle.generate(ids)
        tokenizer_ids = [t for t in plain if 0 < t < 90]  # one printable character each
        vocab = oracle.model.config.vocab_size
        if "repetition" in kinds:
            self.options["repetition_penalty"] = self.theirs["repetition_penalty"] = 1.7
        if "occurrence" in kinds:
            both = {"presence_penalty": 0.7, "frequency_penalty": 1.1}
            self.options |= both
            self.theirs["logits_processor"] = oracle.occurrence_penalties(len(ids), 0.7, 1.1)
        if "bias" in kinds:
            biases = {plain[0]: -3.5, plain[3]: -2.0, 17: 1.25, plain[5]: 0.5}
            self.options["logit_bias"] = biases
            self.theirs["sequence_bias"] = [[[token], bias] for token, bias in biases.items()]
        if "bad words" in kinds and len(tokenizer_ids) > 1:
            words = [tokenizer_ids[:1], plain_pair(plain), [40, 41, 42]]
            words = [word for word in words if word]
            self.words, self.theirs["bad_words_ids"] = words, words
        if "min tokens" in kinds:
            self.options |= {"min_tokens": 6, "stop_token_ids": [plain[2]]}
            self.theirs |= {"eos_token_id": [*sorted(ends), plain[2]], "min_new_tokens": 6}
        if "allowed" in kinds:
            allowed = sorted({*range(1, vocab, 3), *plain[1::2], *tokenizer_ids})
            self.options["allowed_token_ids"] = allowed
            self.theirs["suppress_tokens"] = sorted({*range(vocab)} - {*allowed})

    def params(self, tokenizer, **options):
        if words := getattr(self, "words", None):
            options["bad_words"] = [tokenizer.decode(word) for word in words]
        return greedy(**(self.options | options))


def plain_pair(plain):
    """Two tokens that follow one another in the output, each a printable character."""
    pairs = itertools.pairwise(plain)
    return next(([a, b] for a, b in pairs if 0 < a < 90 and 0 < b < 90 and a != b), [50, 51])


KINDS = ["repetition", "occurrence", "bias", "bad words", "min tokens", "allowed"]


def check(llm, oracle, kinds, prompts=None):
    """Compare tokens and scores of the edge prompts with the oracle's; returns what it gives."""
    ends = llm.scheduler.eos_token_ids
    cases = [Case(oracle, ids, kinds, ends) for ids in prompts or edge_prompts()]
    params = [case.params(llm.tokenizer, logprobs=3) for case in cases]
    outputs = llm.generate([case.ids for case in cases], params, use_tqdm=False)
    results = []
    for case, output in zip(cases, outputs, strict=True):
        want, logprobs = oracle.generate(case.ids, **case.theirs)
        assert output["token_ids"] == want, case.theirs
        check_scores(output["logprobs"], want, logprobs, 3)
        results.append(want)
    return results


# Log probabilities that are closer than this may come in either order: it is up to the processor.
TIE = 1e-4


def check_scores(found, token_ids, logprobs, count):
    """Compare an output's scores with log probabilities [tokens, V]."""
    assert len(found) == len(token_ids)
    for scores, token, expected in zip(found, token_ids, logprobs, strict=True):
        last = np.sort(expected)[-count]
        assert token in scores
        assert len(scores) == count + (scores[token].rank > count)
        assert all(expected[other] > last - TIE for other in scores if other != token)
        for other, entry in scores.items():
            assert abs(entry.logprob - expected[other]) < TIE
            surely = 1 + (expected > expected[other] + TIE).sum()
            assert surely <= entry.rank <= (expected > expected[other] - TIE).sum()


@pytest.mark.parametrize("kinds", [[], *([kind] for kind in KINDS), KINDS], ids="-".join)
def test_tokens_and_scores_are_those_of_transformers(engine, oracle_of, kinds):
    llm = engine(checkpoint={"tokenizer": True})
    poison(llm)
    plain = tokens(llm, edge_prompts(), greedy())
    llm.reset_prefix_cache()
    got = check(llm, oracle_of("gqa"), kinds)
    changed = sum(a != b for a, b in zip(got, plain, strict=True))
    assert changed >= (2 if kinds else 0), "the options hardly show"


@pytest.mark.parametrize("options", [CHUNKED, TINY_POOL, {"enforce_eager": True}, MIXED], ids=str)
def test_all_options_together_chunked_preempted_eager_and_mixed(
    engine, oracle_of, monkeypatch, options
):
    llm = engine(checkpoint={"tokenizer": True}, **options)
    poison(llm)
    spy = Spy(llm, monkeypatch)
    prompts = [edge_prompts()[i] for i in (2, 3, 0, 1, 4, 5)]
    check(llm, oracle_of("gqa"), KINDS, prompts)
    assert bool(spy.preempted) == (options is TINY_POOL)
    chunks = [row for is_prefill, rows in spy.batches if is_prefill for row in rows]
    assert any(start > 0 for _, start, _ in chunks) or options is not CHUNKED
    assert any(spy.num_decodes) == (options is MIXED)


@pytest.mark.parametrize("options", [*MESHES, MESHES[1] | {"every_bucket": True}], ids=str)
def test_all_options_together_on_meshes(engine, oracle_of, options):
    """With every bucket, steps have fewer rows than the program that samples."""
    llm = engine("eight_heads", checkpoint={"tokenizer": True}, **options)
    poison(llm)
    check(llm, oracle_of("eight_heads"), KINDS)


# --- scores of prompts ---


def check_prompts(llm, oracle, prompts, count=2):
    outputs = llm.generate(prompts, greedy(3, prompt_logprobs=count), use_tqdm=False)
    for ids, output in zip(prompts, outputs, strict=True):
        first, *rest = output["prompt_logprobs"]
        assert first is None
        check_scores(rest, ids[1:], oracle.prompt_logprobs(ids)[:-1], count)
        assert "logprobs" not in output
    return [output["token_ids"] for output in outputs]


@pytest.mark.parametrize("options", [{}, CHUNKED, TINY_POOL, MIXED, *MESHES], ids=str)
def test_prompts_are_scored(engine, oracle_of, options):
    shape = "eight_heads" if options in MESHES else "gqa"
    llm = engine(shape, checkpoint={"tokenizer": True}, **options)
    poison(llm)
    check_prompts(llm, oracle_of(shape), edge_prompts())


def test_a_prompt_in_the_prefix_cache_is_scored_all_the_same(engine, oracle_of, monkeypatch):
    llm = engine(checkpoint={"tokenizer": True})
    poison(llm)
    prompts = [prompt(600, seed=9)]
    want = tokens(llm, prompts, greedy(3))
    spy = Spy(llm, monkeypatch)
    assert check_prompts(llm, oracle_of("gqa"), prompts) == want
    assert spy.prefill_tokens == 600, "cached tokens were not computed again"
    assert tokens(llm, prompts, greedy(3)) == want
    assert spy.prefill_tokens == 600 + 600 % BLOCK, "what was computed again stayed in the cache"


# --- sampling ---


def requests_of_every_kind(number):
    """Requests at temperature 1, each with a seed; their options differ in kind."""
    kinds = [
        {},
        {"top_k": 9, "top_p": 0.9},
        {"repetition_penalty": 1.4},
        {"presence_penalty": 0.9, "min_p": 0.02},
        {"frequency_penalty": -0.4},
        {"logit_bias": {3: 4.0, 60: -2.0}, "top_p": 0.8},
        {"allowed_token_ids": [*range(20, 60)]},
        {"bad_words": ["a", "bc", "xyz"]},
        {"min_tokens": 9, "stop_token_ids": [*range(30, 70)]},
        {"logprobs": 5},
        {"logprobs": 0, "prompt_logprobs": 1, "repetition_penalty": 0.8, "top_k": 30},
    ]
    return [
        SamplingParams(seed=i, max_tokens=12, ignore_eos=True, **kinds[i % len(kinds)])
        for i in range(number)
    ]


SHORT = {"max_model_len": 64, "max_num_batched_tokens": 64}
SAMPLING_ENGINES = [{}, {"mesh_shape": {"data": 2, "tensor": 2}}]
SAMPLING_ENGINES += [options | SHORT | {"enable_mixed_chunk": True} for options in SAMPLING_ENGINES]


@pytest.mark.parametrize("options", SAMPLING_ENGINES, ids=str)
def test_a_request_gives_the_same_alone_and_among_others_of_every_kind(engine, options):
    shape = "eight_heads" if "mesh_shape" in options else "gqa"
    size = {"max_num_seqs": 40, "num_kvcache_blocks": 48}
    llm = engine(shape, checkpoint={"tokenizer": True}, **size, **options)
    params = requests_of_every_kind(33)
    prompts = [prompt(3 + i, seed=i) for i in range(33)]
    together = llm.generate(prompts, params, use_tqdm=False)
    llm.reset_prefix_cache()
    for i in range(11):
        [alone] = llm.generate([prompts[i]], params[i], use_tqdm=False)
        assert alone["token_ids"] == together[i]["token_ids"], params[i]
        assert alone.keys() == together[i].keys()
        for a, b in zip(alone.get("logprobs", []), together[i].get("logprobs", []), strict=True):
            assert a.keys() == b.keys()
            assert all(abs(a[token].logprob - b[token].logprob) < 1e-4 for token in a)


@pytest.mark.parametrize("options", [{}, {"mesh_shape": {"data": 2, "tensor": 2}}], ids=str)
def test_many_rows_are_worked_on_in_parts(engine, new_engine, checkpoint, monkeypatch, options):
    shape = "eight_heads" if options else "gqa"
    params, prompts = requests_of_every_kind(33), [prompt(3 + i, seed=i) for i in range(33)]
    whole = engine(
        shape, checkpoint={"tokenizer": True}, max_num_seqs=40, num_kvcache_blocks=48, **options
    )
    want = whole.generate(prompts, params, use_tqdm=False)
    for module in (programs, step):
        monkeypatch.setattr(module, "ROWS_AT_ONCE", 8)
    llm = new_engine(
        checkpoint(shape, tokenizer=True), max_num_seqs=44, num_kvcache_blocks=48, **options
    )
    assert max(llm.runner.programs.samples_all) == (24 if options else 48)
    got = llm.generate(prompts, params, use_tqdm=False)
    assert [x["token_ids"] for x in got] == [x["token_ids"] for x in want]
    for a, b in zip(got, want, strict=True):
        assert [[*scores] for scores in a.get("logprobs", [])] == [
            [*scores] for scores in b.get("logprobs", [])
        ]


def test_what_is_forbidden_is_never_drawn(engine):
    llm = engine(checkpoint={"tokenizer": True})
    params = [
        SamplingParams(temperature=3.0, seed=i, max_tokens=60, ignore_eos=True, **options)
        for i, options in enumerate(
            [
                {"allowed_token_ids": [5, 130, 77]},
                {"bad_words": ["a", "b c", "c"]},
                {"min_tokens": 50, "stop_token_ids": [*range(1, 60)]},
                {"logit_bias": dict.fromkeys(range(131), -1e9) | {9: 0.0, 8: 0.0}},
            ]
        )
    ]
    outputs = llm.generate([prompt(4)] * 4, params, use_tqdm=False)
    assert {*outputs[0]["token_ids"]} == {5, 130, 77}
    assert not {*"ac"} & {*outputs[1]["text"]} and len(outputs[1]["token_ids"]) == 60
    assert not {*range(60)} & {*outputs[2]["token_ids"][:50]}
    assert 50 < len(outputs[2]["token_ids"]) < 60, "a stop token ends it soon after"
    assert {*outputs[3]["token_ids"]} == {8, 9}


def test_a_slot_forgets_the_options_of_its_last_request(engine):
    llm = engine(checkpoint={"tokenizer": True}, max_num_seqs=1)
    free = SamplingParams(temperature=0, max_tokens=4, logprobs=0)
    [want] = tokens(llm, [prompt(5)], free)
    bound = SamplingParams(temperature=0, max_tokens=4, allowed_token_ids=[9], min_tokens=2)
    other = SamplingParams(temperature=0, max_tokens=4, allowed_token_ids=[8])
    got = tokens(llm, [prompt(5)] * 4, [bound, free, other, bound])
    assert got == [[9] * 4, want, [8] * 4, [9] * 4]


# --- outputs ---


def test_outputs_carry_scores_as_they_come(engine):
    llm = engine(checkpoint={"tokenizer": True})
    llm.add_request(prompt(6), greedy(5, logprobs=2, prompt_logprobs=0, ignore_eos=True))
    llm.add_request(prompt(7), greedy(5, logprobs=0, detokenize=False, ignore_eos=True))
    last, seen = {}, 0
    while not llm.is_finished():
        for output in llm.step_outputs():
            [completion] = output.outputs
            assert len(completion.logprobs) == len(completion.token_ids)
            own = [s[t] for s, t in zip(completion.logprobs, completion.token_ids, strict=True)]
            assert completion.cumulative_logprob == pytest.approx(sum(e.logprob for e in own))
            last[output.request_id], seen = output, seen + 1
    assert seen > 4
    first, second = last.values()
    assert [len(scores) for scores in first.outputs[0].logprobs] == [2] * 5, "greedy: rank 1"
    assert [len(scores) for scores in second.outputs[0].logprobs] == [1] * 5
    assert first.prompt_logprobs[0] is None and len(first.prompt_logprobs) == 6
    assert second.prompt_logprobs is None
    for token, entry in first.outputs[0].logprobs[0].items():
        assert entry == Logprob(entry.logprob, entry.rank, llm.tokenizer.decode([token]))
    assert next(iter(second.outputs[0].logprobs[0].values())).decoded_token is None


def test_a_result_has_no_scores_unless_asked_for(engine):
    llm = engine(checkpoint={"tokenizer": True})
    [result] = llm.generate([prompt(4)], greedy(2, repetition_penalty=1.2), use_tqdm=False)
    assert result.keys() == {"text", "token_ids"}


def test_calls_take_several_steps_only_without_options(engine, monkeypatch):
    llm = engine(checkpoint={"tokenizer": True})
    spy = Spy(llm, monkeypatch)
    for options in ({"logprobs": 0}, {"presence_penalty": 0.1}, {"min_tokens": 1}):
        tokens(llm, [prompt(4)], greedy(9, ignore_eos=True, **options))
    assert {*spy.num_steps} == {1}
    tokens(llm, [prompt(4)], greedy(9, ignore_eos=True))
    assert max(spy.num_steps) == 4


# --- commands, errors ---


def test_options_survive_the_way_to_other_processes():
    params = SamplingParams(
        logit_bias={3: 1.5}, allowed_token_ids=[4, 5], bad_words=["no"], min_tokens=2,
        stop_token_ids=[7], logprobs=3, prompt_logprobs=0, repetition_penalty=1.1,
    ).frozen()  # fmt: skip
    edits = [Edit(3, 1.5, 0, 0), Edit(7, -math.inf, -1, 1)]
    command = commands.AddRequest([1, 2], params, edits=edits, numbers=[4])
    assert commands.decode(commands.encode([command])) == [command]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logit_bias": {500: 1.0}}, "logit_bias: token id 500 is not in the vocabulary"),
        ({"allowed_token_ids": [131]}, "allowed_token_ids: token id 131 is not"),
        ({"logit_bias": dict.fromkeys(range(131), 0.5), "bad_words": ["ab" * 500]}, "1131 entries"),
    ],
)
def test_what_the_engine_cannot_do_is_refused_with_the_option(engine, options, message):
    llm = engine(checkpoint={"tokenizer": True})
    with pytest.raises(ValueError, match=message):
        llm.generate([[1]], SamplingParams(**options), use_tqdm=False)


def test_bad_words_take_a_tokenizer(engine):
    with pytest.raises(ValueError, match="bad_words: the model has no tokenizer; use logit_bias"):
        engine().generate([[1]], SamplingParams(bad_words=["x"]), use_tqdm=False)


def test_prompts_of_other_lengths_than_a_call_scores(engine, oracle_of):
    """Calls score 128 tokens each."""
    llm = engine(checkpoint={"tokenizer": True})
    check_prompts(llm, oracle_of("gqa"), [prompt(n, seed=4) for n in (2, 129, 130, 700)], count=20)
