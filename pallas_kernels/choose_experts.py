"""A router's choice: the likeliest experts of each token, and their weights."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from pallas_kernels._common import (
    Implementation,
    check_implementation,
    next_power_of_2,
    use_interpreter,
)


@functools.partial(
    jax.jit, static_argnames=("num_choices", "normalize", "dtype", "implementation", "interpret")
)
def choose_experts(
    scores: Float[Array, "T E"],
    slots: Int32[Array, " T"],
    *,
    num_choices: int,
    normalize: bool,
    dtype: DTypeLike,
    implementation: Implementation,
    interpret: bool | None = None,
) -> tuple[Int32[Array, "T A"], Float[Array, "T A"]]:
    """Return the numbers and weights of each token's likeliest experts, the likeliest first.

    Args:
        scores: what the router gives each expert, in float32.
        slots: below 0 for padding rows, which choose nobody: their numbers are -1.
        num_choices: A, the number of experts of a token. Of equal scores the lower numbers win.
        normalize: let the weights of a token add up to 1. Otherwise they are probabilities among
            all experts.
        dtype: of the weights, which are computed in float32.
        implementation: "mosaic" is the Triton kernel, too.
        interpret: run the kernel in Pallas's interpreter; None: if there is no GPU.

    Raises:
        ValueError: there are fewer experts than choices, or the implementation is unknown.

    XLA computes the softmax first and then sorts all scores, in kernels of their own.
    """
    check_implementation(implementation)
    num_tokens, num_experts = scores.shape
    if num_choices > num_experts:
        raise ValueError(f"{num_choices} experts cannot be chosen from {num_experts}")
    if implementation == "xla":
        weights, choices = lax.top_k(jax.nn.softmax(scores, axis=-1), num_choices)
        if normalize:
            weights /= weights.sum(axis=-1, keepdims=True)
        return jnp.where(slots[:, None] >= 0, choices, -1), weights.astype(dtype)
    shape = num_tokens, num_choices
    return pl.pallas_call(
        functools.partial(_kernel, normalize=normalize),
        grid=(num_tokens,),
        out_shape=(jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, dtype)),
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        interpret=use_interpreter(interpret),
        name="choose_experts",
    )(scores, slots)


def _kernel(scores_ref, slots_ref, choices_ref, weights_ref, *, normalize: bool):
    """Run one program per token, which takes the largest score until it has enough."""
    num_experts, num_choices = scores_ref.shape[1], choices_ref.shape[1]
    token = pl.program_id(0)
    padded = next_power_of_2(num_experts)
    expert, place = jnp.arange(padded), jnp.arange(next_power_of_2(num_choices))
    exists = expert < num_experts
    scores = plgpu.load(scores_ref.at[token, expert], mask=exists, other=-jnp.inf)
    largest = scores.max()
    total = jnp.exp(scores - largest).sum()
    choices = jnp.full(place.shape, -1, jnp.int32)
    weights = jnp.zeros(place.shape, jnp.float32)
    for i in range(num_choices):
        best = scores.max()
        # Without an equal, which NaN does not have, it is a number that no expert has.
        chosen = jnp.where(scores == best, expert, padded).min()
        choices = jnp.where(place == i, chosen, choices)
        weights = jnp.where(place == i, jnp.exp(best - largest), weights)
        scores = jnp.where(expert == chosen, -jnp.inf, scores)
    weights /= weights.sum() if normalize else total
    choices = jnp.where(slots_ref[token] >= 0, choices, -1)
    kept = place < num_choices
    plgpu.store(choices_ref.at[token, place], choices, mask=kept)
    plgpu.store(weights_ref.at[token, place], weights.astype(weights_ref.dtype), mask=kept)
