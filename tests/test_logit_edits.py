"""Changes of logits against a NumPy oracle that follows vLLM's formulas one row at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from nanovllm_jax import SamplingParams
from nanovllm_jax.engine.edits import ALWAYS, MOST_EDITS, UNTIL_MIN_TOKENS, Edit, edits_of
from nanovllm_jax.layers.logit_edits import (
    AllowedTokens,
    Edits,
    History,
    Penalties,
    edit_logits,
)
from nanovllm_jax.sharding import make_sharding

V, N = 208, 40  # vocabulary, and positions of a history
END, STOP = 3, 5


class Row:
    """One request's options and tokens so far, drawn at random; a third of the options is off."""

    def __init__(self, rng):
        def sometimes(value):
            return value if rng.random() < 0.67 else None

        few = rng.integers(2, 9)  # distinct tokens, so that many occur again
        tokens = rng.choice(rng.integers(0, V, few), N).tolist()
        self.prompt = tokens[: rng.integers(1, 20)]
        self.output = tokens[len(self.prompt) :][: rng.integers(0, 20)]
        known = self.prompt + self.output
        biased = rng.choice(V, 6, replace=False).tolist()
        self.params = SamplingParams(
            presence_penalty=sometimes(float(rng.uniform(-2, 2))) or 0.0,
            frequency_penalty=sometimes(float(rng.uniform(-2, 2))) or 0.0,
            repetition_penalty=sometimes(float(rng.uniform(0.5, 2))) or 1.0,
            logit_bias=sometimes({t: float(rng.normal() * 5) for t in biased}),
            allowed_token_ids=sometimes(rng.choice(V, 60, replace=False).tolist()),
            min_tokens=sometimes(int(rng.integers(1, 20))) or 0,
            stop_token_ids=[STOP],
        )
        self.bad_words = []
        if rng.random() < 0.67:
            # Half of them continue what is there, others begin before the output.
            for length in (1, 2, 3, 5):
                tail = known[len(known) - length + 1 :] if length > 1 else []
                if rng.random() < 0.3 and tail:
                    tail = [*tail[:-1], (tail[-1] + 1) % V]
                self.bad_words.append([*tail, int(rng.integers(V))])
        self.edits = edits_of(self.params, self.bad_words, [END])

    def expected(self, logits):
        """The row's logits after vLLM's logits processors and penalties, in its order."""
        x, p = logits.astype(np.float64), self.params
        if p.allowed_token_ids is not None:
            x[~np.isin(np.arange(V), p.allowed_token_ids)] = -np.inf
        for *prefix, last in self.bad_words:
            past = self.output[max(0, len(self.output) - len(prefix)) :]
            if past == prefix or not prefix:
                x[last] = -np.inf
        if len(self.output) < p.min_tokens:
            x[[END, STOP]] = -np.inf
        for token, bias in (p.logit_bias or {}).items():
            x[token] += bias
        for token in {*self.prompt, *self.output}:
            x[token] = x[token] / p.repetition_penalty if x[token] > 0 else (
                x[token] * p.repetition_penalty
            )  # fmt: skip
        for token in {*self.output}:
            x[token] -= p.frequency_penalty * self.output.count(token) + p.presence_penalty
        return x


def arrays_of(rows, rng):
    """The arguments of `edit_logits`; what means nothing is filled with noise."""
    history = rng.integers(0, V, (len(rows), N)).astype(np.int32)
    shape = len(rows), MOST_EDITS
    tokens, back, targets = (rng.integers(-1, 9, shape).astype(np.int32) for _ in range(3))
    biases = np.full(shape, np.nan, np.float32)
    words = rng.integers(0, 2**32, (len(rows), -(-V // 32)))
    for i, row in enumerate(rows):
        known = row.prompt + row.output
        history[i, : len(known)] = known
        for j, edit in enumerate(row.edits):
            tokens[i, j], biases[i, j], back[i, j], targets[i, j] = edit
        if row.params.allowed_token_ids is not None:
            words[i] = 0
            for token in row.params.allowed_token_ids:
                words[i, token // 32] |= 1 << token % 32
    lengths = [len(row.prompt) + len(row.output) for row in rows]
    prompts = [len(row.prompt) for row in rows]
    ends = [len(row.prompt) + row.params.min_tokens for row in rows]
    names = ("presence", "frequency", "repetition")
    penalties = [[getattr(row.params, f"{name}_penalty") for row in rows] for name in names]
    return (
        History(*map(_ints, (history, lengths, prompts))),
        AllowedTokens(
            _ints(words), jnp.array([row.params.allowed_token_ids is not None for row in rows])
        ),
        Edits(
            _ints(tokens), jnp.asarray(biases), _ints(back), _ints(targets),
            _ints([len(row.edits) for row in rows]), _ints(ends),
        ),
        Penalties(*(jnp.array(x, jnp.float32) for x in penalties)),
    )  # fmt: skip


def _ints(x):
    return jnp.asarray(np.asarray(x).astype(np.uint32).view(np.int32))


@functools.cache
def over(devices):
    if devices == 1:
        return jax.jit(edit_logits)
    sharding = make_sharding({"tensor": devices})
    by_vocab = P(None, "tensor")
    edit = functools.partial(edit_logits, axis=("tensor",))
    return jax.jit(sharding.shard_map(edit, (by_vocab, P(), P(), P(), P()), by_vocab))


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("seed", range(8))
def test_logits_change_as_vllm_changes_them(devices, seed):
    rng = np.random.default_rng([seed, devices])
    rows = [Row(rng) for _ in range(24)]
    logits = rng.standard_normal((24, V)).astype(np.float32) * 4
    got = np.asarray(over(devices)(jnp.asarray(logits), *arrays_of(rows, rng)))
    for i, row in enumerate(rows):
        np.testing.assert_allclose(got[i], row.expected(logits[i]), rtol=1e-5, atol=1e-5)


def test_the_rows_that_are_drawn_have_every_kind_of_option():
    """Otherwise the test above would show little."""
    rows = [Row(np.random.default_rng(seed)) for seed in range(50)]
    zeros = np.zeros(V)
    assert sum(len(row.output) < row.params.min_tokens for row in rows) > 5
    assert sum(row.params.allowed_token_ids is None for row in rows) > 5
    only_words = [row for row in rows if row.bad_words and row.params.allowed_token_ids is None]
    banned = [np.isneginf(row.expected(zeros)).sum() for row in only_words]
    assert max(banned) > 3 and min(banned) >= 1


def test_a_neutral_row_keeps_its_logits_bit_by_bit():
    rng = np.random.default_rng(0)
    rows = [Row(rng) for _ in range(8)]
    for row in rows:
        row.params, row.edits = SamplingParams(), []
    logits = rng.standard_normal((8, V)).astype(np.float32)
    logits[:, :3] = 0.0, -0.0, -np.inf
    got = np.asarray(over(1)(jnp.asarray(logits), *arrays_of(rows, rng)))
    np.testing.assert_array_equal(got.view(np.int32)[:, 2:], logits.view(np.int32)[:, 2:])
    np.testing.assert_array_equal(got, logits)


def test_the_edits_of_a_request_are_drawn_in_its_docstring():
    params = SamplingParams(logit_bias={7: -1.5}, min_tokens=2, stop_token_ids=[9])
    assert edits_of(params, [[20, 21, 22], [30]], ends=[2]) == [
        Edit(7, -1.5, ALWAYS, 0),
        Edit(2, -np.inf, UNTIL_MIN_TOKENS, 1),
        Edit(9, -np.inf, UNTIL_MIN_TOKENS, 2),
        Edit(20, 0.0, 2, 5),
        Edit(21, 0.0, 1, 5),
        Edit(22, -np.inf, ALWAYS, 5),
        Edit(30, -np.inf, ALWAYS, 6),
    ]


def test_a_request_that_forbids_all_that_it_allows_is_refused():
    params = SamplingParams(allowed_token_ids=[2, 9, 30], min_tokens=2, stop_token_ids=[9])
    with pytest.raises(ValueError, match=r"allowed_token_ids \[2, 9, 30\] are all forbidden"):
        edits_of(params, [[30]], ends=[2])
    assert edits_of(params, [[9, 30]], ends=[2]), "30 is forbidden behind 9 alone"


def test_edits_fill_their_room_and_no_more():
    params = SamplingParams(logit_bias=dict.fromkeys(range(1000), 1.0))
    words = [[1, 2, 3]] * 8
    assert len(edits_of(params, words, ends=[])) == MOST_EDITS
    with pytest.raises(ValueError, match=r"1025 entries.*1000 biases, 25 tokens.*room for 1024"):
        edits_of(params, [*words, [1]], ends=[])
