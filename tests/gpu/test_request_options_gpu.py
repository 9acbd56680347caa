"""What requests ask for beside filters, on a GPU: changed logits, scores, and whole requests."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_logit_edits import Row, V, arrays_of

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.layers.logit_edits import edit_logits
from nanovllm_jax.layers.scores import score
from nanovllm_jax.sampling_params import MOST_LOGPROBS
from nanovllm_jax.tools.shapes import SHAPES, write_config


@pytest.mark.parametrize("seed", range(4))
def test_logits_change_as_vllm_changes_them(seed):
    rng = np.random.default_rng(seed)
    rows = [Row(rng) for _ in range(64)]
    logits = rng.standard_normal((64, V)).astype(np.float32) * 4
    got = np.asarray(jax.jit(edit_logits)(jnp.asarray(logits), *arrays_of(rows, rng)))
    for i, row in enumerate(rows):
        np.testing.assert_allclose(got[i], row.expected(logits[i]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vocab", [151_936, 151_931, 49_152, 128_256])
def test_scores_of_large_vocabularies(vocab):
    rng = np.random.default_rng(vocab)
    logits = np.round(rng.standard_normal((64, 151_936)).astype(np.float32) * 40) / 8  # with ties
    tokens = rng.integers(0, vocab, 64).astype(np.int32)
    run = jax.jit(score, static_argnames="vocab_size")
    got = jax.device_get(run(jnp.asarray(logits), jnp.asarray(tokens), vocab_size=vocab))
    x = logits[:, :vocab].astype(np.float64)
    largest = x.max(axis=1, keepdims=True)
    logprobs = x - largest - np.log(np.exp(x - largest).sum(axis=1, keepdims=True))
    own = logprobs[np.arange(64), tokens]
    np.testing.assert_allclose(got.logprobs, own, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got.ranks, (logprobs >= own[:, None]).sum(axis=1))
    order = np.argsort(-x, axis=1, kind="stable")[:, :MOST_LOGPROBS]
    np.testing.assert_array_equal(got.top_ids, order)
    top = np.take_along_axis(logprobs, order, axis=1)
    np.testing.assert_allclose(got.top_logprobs, top, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gpus", [1, 2])
def test_requests_with_options_keep_to_them(tmp_path, gpus):
    """96 rows are more than are worked on at once, and the largest of their sizes is 96."""
    if len(jax.devices()) < gpus:
        pytest.skip(f"takes {gpus} GPUs")
    write_config(replace(SHAPES["0.6B"], num_layers=4), tmp_path)
    base = SamplingParams(seed=3, max_tokens=20, ignore_eos=True, detokenize=False)
    kinds = [
        {"allowed_token_ids": [*range(0, 151_000, 1000)]},
        {"logit_bias": {77: 1e6}},
        {"logit_bias": {77: 1e6}, "min_tokens": 20, "stop_token_ids": [77]},
        {"temperature": 0, "repetition_penalty": 100.0, "presence_penalty": 2.0},
        {"temperature": 0, "logprobs": 20, "prompt_logprobs": 2},
        {"top_k": 5, "logprobs": 5},
    ]
    params = [replace(base, **kinds[i % 6]) for i in range(96)]
    prompts = [[5 + i, 6, 7 * i] * 50 for i in range(96)]
    with LLM(
        str(tmp_path), load_format="dummy", tensor_parallel_size=gpus, max_num_seqs=96,
        max_num_batched_tokens=2048, max_model_len=1024, num_kvcache_blocks=128,
    ) as llm:  # fmt: skip
        outputs = llm.generate(prompts, params, use_tqdm=False)
    for i, output in enumerate(outputs):
        ids = output["token_ids"]
        assert len(ids) == 20
        match i % 6:
            case 0:
                assert not any(token % 1000 for token in ids)
            case 1:
                assert {*ids} == {77}
            case 2:
                assert 77 not in ids[:20]
            case 4 | 5:
                for token, scores in zip(ids, output["logprobs"], strict=True):
                    assert token in scores and scores[token].rank <= (1 if i % 6 == 4 else 5)
                    total = sum(np.exp(entry.logprob) for entry in scores.values())
                    assert 0 < total <= 1.0001
        if i % 6 == 4:
            assert len(output["prompt_logprobs"]) == 150 and output["prompt_logprobs"][0] is None
