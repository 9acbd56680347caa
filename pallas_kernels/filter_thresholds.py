"""Finds in one pass over the logits which of them min_p, top_k and top_p keep."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels._common import LOG2_E, cdiv, use_interpreter

# Programs that read a row, each every fourth block of it, so that they see equally likely entries.
_PARTS = 4
# Entries of a block. Each is the next one of a lane, which keeps its best.
_LANES = 512
# Best entries that a lane keeps. The n highest of a row are surely among those of all 2,048 lanes
# unless six of them share a lane, which has a probability of n^6 / (6! 2048^5): one in 400,000 for
# 200, in 6,000 for 400, and in 100 for 800.
_DEPTH = 6
# Blocks that a program loads before it looks at any: memory is slow to answer.
_AHEAD = 4

_LOWEST = float(jnp.finfo(jnp.float32).min)
_KEY_OF_MINUS_INFINITY = 0x007FFFFF


@functools.partial(jax.jit, static_argnames=("vocab_size", "interpret"))
def filter_thresholds(
    logits: Float[Array, "B V"],
    temperatures: Float[Array, " B"],
    top_k: Int[Array, " B"],
    top_p: Float[Array, " B"],
    min_p: Float[Array, " B"],
    *,
    vocab_size: int,
    interpret: bool | None = None,
) -> Float[Array, " B"]:
    """Return each row's threshold: min_p, top_k and then top_p keep the logits that reach it.

    It is exact, but for the rounding of the sums of top_p. A row's does not depend on the others.

    Args:
        logits: float32; -inf is never counted.
        temperatures: from 0, which is taken for 1e-6, to 1e30.
        top_k: 0 or less keeps all.
        top_p: in (0, 1], and no subnormal number; 1 keeps all.
        min_p: in [0, 1]; 0 keeps all.
        vocab_size: entries from here on are padding.
        interpret: run the kernels in Pallas's interpreter; None: if there is no GPU.

    One kernel reads the logits. Each lane of it keeps its best few, and sums up the mass of all.
    Whatever lies above every lane's last is kept by some lane, and that is mostly enough for
    another kernel to search among. A row that it is not enough for is searched as a whole.
    """
    batch, width = logits.shape
    interpret = use_interpreter(interpret)
    lanes = _PARTS * _LANES
    best, masses = pl.pallas_call(
        functools.partial(_collect, width=min(width, vocab_size)),
        grid=(_PARTS, batch),
        out_shape=[
            jax.ShapeDtypeStruct((batch, _DEPTH, lanes), jnp.float32),
            jax.ShapeDtypeStruct((batch, lanes), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="filter_collect",
    )(logits, temperatures)
    return pl.pallas_call(
        functools.partial(_choose, width=min(width, vocab_size)),
        grid=(batch,),
        out_shape=jax.ShapeDtypeStruct((batch,), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=16, num_stages=1),
        interpret=interpret,
        name="filter_choose",
    )(best, masses, logits, temperatures, top_k, top_p, min_p)


def _collect(logits_ref, temperatures_ref, best_ref, masses_ref, *, width: int):
    """Write the best entries of each lane, highest first, and its mass with that of the first as 1.

    Run one program per part and row.
    """
    part, b = pl.program_id(0), pl.program_id(1)
    lanes = jnp.arange(_LANES)
    scale = _scale(temperatures_ref[b])

    def load(i):
        blocks = [(i * _AHEAD + j) * _PARTS + part for j in range(_AHEAD)]
        return [_load(logits_ref, b, block * _LANES + lanes, width) for block in blocks]

    def step(i, state):
        blocks, best, mass = state
        following = load(i + 1)  # on their way while these blocks are worked on
        for x in blocks:
            distance = (x - best[0]) * scale
            smaller = jnp.exp2(-jnp.abs(distance))  # of the weights of this one and the first
            mass = jnp.where(distance > 0, mass * smaller + 1, mass + smaller)
            for d in range(_DEPTH):
                best[d], x = jnp.maximum(best[d], x), jnp.minimum(best[d], x)
        return following, best, mass

    lowest = jnp.full((_LANES,), _LOWEST, jnp.float32)
    state = load(0), [lowest] * _DEPTH, jnp.zeros((_LANES,), jnp.float32)
    steps = cdiv(width, _PARTS * _AHEAD * _LANES)
    _, best, mass = lax.fori_loop(0, steps, step, state)
    for d in range(_DEPTH):
        plgpu.store(best_ref.at[b, d, part * _LANES + lanes], best[d])
    plgpu.store(masses_ref.at[b, part * _LANES + lanes], mass)


def _choose(
    best_ref, masses_ref, logits_ref, temperatures_ref, top_k_ref, top_p_ref, min_p_ref,
    threshold_ref, *, width: int,
):  # fmt: skip
    """Search a row's threshold, among the lanes' best if it is sure to lie there.

    Run one program per row. Thresholds are `_key`s.
    """
    b = pl.program_id(0)
    top_k, top_p, min_p = top_k_ref[b], top_p_ref[b], min_p_ref[b]
    scale = _scale(temperatures_ref[b])
    lanes = jnp.arange(_PARTS * _LANES)
    best = [plgpu.load(best_ref.at[b, d, lanes]) for d in range(_DEPTH)]
    highest, bound = best[0].max(), best[-1].max()

    def weight(x):
        return jnp.exp2((x - highest) * scale)

    def too_unlikely(keys):
        return [weight(_float(key)) < min_p for key in keys]

    # The lowest key that min_p keeps.
    floor = _largest(too_unlikely, bits=1, digits=32 * (min_p > 0).astype(jnp.int32)) + 1
    counts, sums = (top_k > 0) & (top_k < width), top_p < 1
    everything = bound == _LOWEST  # lanes have kept all that there is
    bound = _key(bound)

    def known(key):
        """Whether all entries from this key on are among the lanes' best."""
        return everything | (key > bound)

    def search(find, mass_reaching):
        """Apply the filters by a search from some key upwards for a number of entries or a mass."""
        threshold = lax.cond(
            counts,
            lambda: jnp.maximum(floor, find(top_k.astype(jnp.float32), False, floor)),
            lambda: floor,
        )
        return lax.cond(
            sums,
            lambda: jnp.maximum(threshold, find(top_p * mass_reaching(threshold), True, threshold)),
            lambda: threshold,
        )

    # Among the lanes' best, which stay in registers.
    among = [(_key(x), weight(x)) for x in best]
    total = (plgpu.load(masses_ref.at[b, lanes]) * among[0][1]).sum()

    def reaching_among(key, weighed):
        reaching = [_reaching(entries, key, weighed) for entries in among]
        return functools.reduce(jnp.add, reaching).sum()

    def mass_among(key):
        mass = jnp.where(counts | (min_p > 0), jnp.inf, total)  # not known: then none suffices
        return jnp.where(known(key), reaching_among(key, True), mass)

    def find_among(wanted, weighed, lower):
        """Tell the key's bits, until one entry is left between what is enough and what is not."""

        def is_open(state):
            bit, _, reaching, beyond = state
            return (bit > 0) & (reaching - beyond > 1)

        def tell_bit(state):
            bit, key, reaching, beyond = state
            number = reaching_among(key | bit, False)
            enough = (reaching_among(key | bit, True) if weighed else number) >= wanted
            key = jnp.where(enough, key | bit, key)
            reaching = jnp.where(enough, number, reaching)
            return bit >> 1, key, reaching, jnp.where(enough, beyond, number)

        upper = _key(highest)
        differ = jnp.maximum(lower, bound) ^ upper
        for shift in (1, 2, 4, 8, 16):
            differ |= differ >> shift  # now ones from the first bit that differs
        state = differ - (differ >> 1), upper & ~differ, jnp.float32(jnp.inf), jnp.float32(0)
        key = lax.while_loop(is_open, tell_bit, state)[1]
        reaching = (jnp.where(keys >= key, keys, upper) for keys, _ in among)
        return functools.reduce(jnp.minimum, reaching).min()

    # Among all entries, as many passes as there are digits.
    def reaching_in_row(keys, weighed):
        def step(i, totals):
            cols = [(i * _AHEAD + j) * lanes.size + lanes for j in range(_AHEAD)]
            for x in [_load(logits_ref, b, c, width) for c in cols]:
                entries = _key(x), weight(x)
                reaching = [_reaching(entries, key, weighed) for key in keys]
                totals = [t + more for t, more in zip(totals, reaching, strict=True)]
            return totals

        steps = cdiv(width, _AHEAD * lanes.size)
        zeros = jnp.zeros(lanes.shape, jnp.float32)
        return [t.sum() for t in lax.fori_loop(0, steps, step, [zeros] * len(keys))]

    def find_in_row(wanted, weighed, _):
        return _largest(
            lambda keys: [s >= wanted for s in reaching_in_row(keys, weighed)], bits=4, digits=8
        )

    threshold = search(find_among, mass_among)
    threshold = lax.cond(
        known(threshold) | ~(counts | sums),
        lambda: threshold,
        lambda: search(find_in_row, lambda key: reaching_in_row([key], True)[0]),
    )
    threshold_ref[b] = _float(jnp.maximum(threshold, jnp.uint32(_KEY_OF_MINUS_INFINITY)))


def _largest(enough, bits: int, digits):
    """Return the largest key that is enough.

    It is found from its highest bits down, like the digits of a long division.

    Args:
        enough: tells whether each of some keys is; if one is, all lower ones are. 0 always is.
        bits: the size of a digit.
        digits: how many to find; those after them are 0.
    """

    def find_digit(i, key):
        shift = jnp.uint32(32 - bits) - jnp.uint32(bits) * i.astype(jnp.uint32)
        candidates = [key | (jnp.uint32(digit) << shift) for digit in range(1, 1 << bits)]
        chosen = zip(enough(candidates), candidates, strict=True)
        return functools.reduce(jnp.maximum, [jnp.where(e, c, key) for e, c in chosen])

    return lax.fori_loop(0, digits, find_digit, jnp.uint32(0))


def _reaching(entries, key, weighed: bool):
    """Return the weights of the entries, pairs of key and weight, that reach a key; or ones."""
    keys, weights = entries
    return jnp.where(keys >= key, weights if weighed else 1.0, 0.0)


def _scale(temperature):
    """Return what a difference of logits is multiplied by to get the logarithm of base 2."""
    return LOG2_E / jnp.maximum(temperature, 1e-6)


def _load(logits_ref, b, cols, width: int):
    """Load entries of a row. What lies beyond is finite, so that differences are no NaNs."""
    return plgpu.load(logits_ref.at[b, cols], mask=cols < width, other=_LOWEST)


def _key(x):
    """Return unsigned integers in the order of the floats; 0.0 and -0.0 get the same."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _float(key):
    """Return the float that has a key."""
    sign = jnp.uint32(1 << 31)
    return lax.bitcast_convert_type(jnp.where(key >= sign, key ^ sign, ~key), jnp.float32)
