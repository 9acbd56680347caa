"""Draws tokens in one pass over the logits, by the Gumbel-max trick.

Given the noise as a formula, XLA writes it to memory, an array as large as the logits, and adds it
in the product that computes them.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int, Int32, UInt32

from pallas_kernels._common import LOG2_E, use_interpreter

# Vocabulary entries that a program looks at in one round of its loop.
_BLOCK = 1024
# Programs that keep the memory of an H100 busy.
_TARGET_PROGRAMS = 2048

# Differences between two quick scores that may be an error: a share of the temperature, for the
# noise (off by 1e-4 at most) and its product, and a share of the score, for the sum with the logit.
_NOISE_MARGIN = 2.0**-12
_SCORE_MARGIN = 2.0**-20


# --- The noise -------------------------------------------------------------------------------


def stream_words(low: UInt32[Array, "*B"], high: UInt32[Array, "*B"], positions: Int[Array, "*B"]):
    """Hash a 64-bit seed, as words, and a position into the two words of `random_bits`.

    It is a Feistel network: at one position two seeds never have both words in common, and in one
    stream two positions never have the first. The constant (the golden ratio's) keeps the second
    word apart from what `mix` makes of the first and an entry, or the two would cancel out.
    """
    first = low ^ mix(high ^ mix(positions.astype(jnp.uint32)))
    second = high ^ mix(first + jnp.uint32(0x9E3779B9))
    return mix(first), mix(second)


def random_bits(words, vocab_ids: Int[Array, "*V"]) -> UInt32[Array, "*V"]:
    """Return 32 random bits for each vocabulary entry from the words of a row.

    Row and entry are hashed apart before they meet, so that the streams of two rows are no shifted
    copies of one another. The second word costs an entry nothing more than an exclusive or.
    """
    first, second = words
    return mix(first ^ mix(vocab_ids.astype(jnp.uint32))) ^ second


def gumbel(bits: UInt32[Array, "*V"]) -> Float[Array, "*V"]:
    """Turn random bits into standard Gumbel noise.

    An exponential variate -log(1 - u) keeps its precision where it matters, at small values, that
    is at large Gumbel values; u stays below 1, so that the noise is finite.
    """
    u = (bits.astype(jnp.float32) + 0.5) * 2.0**-32
    return -jnp.log(-jnp.log1p(-jnp.minimum(u, 1 - 2.0**-24)))


def mix(x: UInt32[Array, "*V"]) -> UInt32[Array, "*V"]:
    """Hash 32 bits by the "lowbias32" mixer: C. Wellons, "Prospecting for Hash Functions", 2018."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _quick_noise(bits, interpret: bool):
    """Return log2(e) * gumbel(bits) plus a constant, off by less than half of `_NOISE_MARGIN`.

    The two logarithms are single instructions, of base 2. That of 1 - u loses its precision if u is
    small; there it is a sum of powers.
    """
    u = jnp.minimum(bits.astype(jnp.float32) * 2.0**-32 + 2.0**-33, 1 - 2.0**-24)
    powers = u * (LOG2_E + u * (LOG2_E / 2 + u * (LOG2_E / 3)))
    exponential = jnp.where(u < 2.0**-8, powers, -_quick_log2(1 - u, interpret))
    return -_quick_log2(exponential, interpret)


def _quick_log2(x, interpret: bool):
    if interpret:
        return jnp.log2(x)
    (out,) = plgpu.elementwise_inline_asm(
        "lg2.approx.ftz.f32 $0, $1;", args=[x], constraints="=f,f", pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )  # fmt: skip
    return out


# --- The kernel ------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("vocab_size", "interpret"))
def draw(
    logits: Float[Array, "B V"],
    temperatures: Float[Array, " B"],
    seeds: UInt32[Array, "B 2"],
    positions: Int[Array, " B"],
    first_id: Int32[Array, ""] | None = None,
    thresholds: Float[Array, " B"] | None = None,
    *,
    vocab_size: int,
    interpret: bool | None = None,
) -> tuple[Float[Array, " B"], Int32[Array, " B"]]:
    """Return each row's highest logit + temperature * noise, and the vocabulary entry that has it.

    They are exactly those of a plain arg max over all sums; of equal ones the lowest entry wins.

    Args:
        logits: float32; -inf is never drawn while there is anything else.
        temperatures: from 0, which is greedy, to 1e30.
        seeds, positions: what the noise is made from, see `stream_words`.
        first_id: the vocabulary entry of the first column, if the vocabulary is sharded; else 0.
        thresholds: lower logits of a row count as -inf.
        vocab_size: entries from here on are padding.
        interpret: run the kernel in Pallas's interpreter; None: if there is no GPU.

    Exact noise costs more instructions than reading a logit takes time. So a row is first scanned
    with noise from quick logarithms, and again with exact noise only if the two best scores are too
    close to trust them, once in thousands of rows.
    """
    batch, width = logits.shape
    blocks = pl.cdiv(width, _BLOCK)
    blocks_per_part = pl.cdiv(blocks, min(blocks, max(1, _TARGET_PROGRAMS // batch)))
    parts = pl.cdiv(blocks, blocks_per_part)
    interpret = use_interpreter(interpret)
    scores, tokens = pl.pallas_call(
        functools.partial(
            _kernel, blocks_per_part=blocks_per_part, vocab_size=vocab_size, interpret=interpret
        ),
        grid=(parts, batch),
        out_shape=[
            jax.ShapeDtypeStruct((batch, parts), jnp.float32),
            jax.ShapeDtypeStruct((batch, parts), jnp.int32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="draw",
    )(
        logits, temperatures, seeds, positions,
        None if first_id is None else jnp.reshape(first_id, 1), thresholds,
    )  # fmt: skip
    none = jnp.float32(-jnp.inf), jnp.int32(jnp.iinfo(jnp.int32).max)
    score, token = lax.reduce((scores, tokens), none, _better, dimensions=(1,))
    return score, token


def _better(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]):
    """The pair of higher score; of equal ones, that of the lower token."""
    first = (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] < b[1]))
    return tuple(jnp.where(first, x, y) for x, y in zip(a, b, strict=True))


def _kernel(
    logits_ref, temperatures_ref, seeds_ref, positions_ref, first_ref, thresholds_ref,
    scores_ref, tokens_ref, *, blocks_per_part: int, vocab_size: int, interpret: bool,
):  # fmt: skip
    """Run one program per part of the vocabulary and row.

    The loop over the part's blocks keeps the best of each lane, and combines lanes only at its end.
    """
    part, b = pl.program_id(0), pl.program_id(1)
    width = logits_ref.shape[1]
    first_id = 0 if first_ref is None else first_ref[0]
    temperature = temperatures_ref[b]
    words = stream_words(seeds_ref[b, 0], seeds_ref[b, 1], positions_ref[b])
    lanes = jnp.arange(_BLOCK)

    def kept(logits):
        if thresholds_ref is None:
            return logits
        return jnp.where(logits >= thresholds_ref[b], logits, -jnp.inf)

    def scan(noise, temperature):
        """Return the highest score of this part, its column, and the second highest score."""

        def step(block, state):
            cols = block * _BLOCK + lanes
            logits = plgpu.load(logits_ref.at[b, cols], mask=cols < width, other=-jnp.inf)
            logits = kept(logits)

            def look():
                best, second, block_of_best = state
                scores = logits + temperature * noise(random_bits(words, first_id + cols))
                if first_ref is not None or vocab_size < width:
                    scores = jnp.where(first_id + cols < vocab_size, scores, -jnp.inf)
                new_block = jnp.where(scores > best, block, block_of_best)
                new_second = jnp.maximum(second, jnp.minimum(best, scores))
                return jnp.maximum(best, scores), new_second, new_block

            if thresholds_ref is None:
                return look()
            # Most blocks have nothing left, which is seen sooner than noise is made.
            return lax.cond(logits.max() > -jnp.inf, look, lambda: state)

        start = part * blocks_per_part
        end = jnp.minimum(start + blocks_per_part, pl.cdiv(width, _BLOCK))
        lowest = jnp.full((_BLOCK,), -jnp.inf, jnp.float32)
        state = lowest, lowest, jnp.full((_BLOCK,), start, jnp.int32)
        best, second, block_of_best = lax.fori_loop(start, end, step, state)
        highest = best.max()
        cols = block_of_best * _BLOCK + lanes
        col = jnp.where(best == highest, cols, width - 1).min()
        return highest, col, jnp.where(cols == col, second, best).max()

    quick = functools.partial(_quick_noise, interpret=interpret)
    highest, col, second = scan(quick, temperature * (1 / LOG2_E))
    margin = temperature * _NOISE_MARGIN + jnp.abs(highest) * _SCORE_MARGIN
    col = lax.cond(highest - second <= margin, lambda: scan(gumbel, temperature)[1], lambda: col)
    token = first_id + col
    score = kept(logits_ref[b, col]) + temperature * gumbel(random_bits(words, token))
    scores_ref[b, part] = jnp.where(token < vocab_size, score, -jnp.inf)
    tokens_ref[b, part] = token
