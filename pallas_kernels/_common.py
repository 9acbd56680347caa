"""Shared by the kernels: tiles of rows, addresses in the paged cache, the online softmax."""

import math
import re
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

Implementation = Literal["triton", "mosaic", "xla"]

LOG2_E = math.log2(math.e)
# The score of a masked position. Finite, because the running maximum of a row in which everything
# is masked so far must not become -inf: exp2(-inf - -inf) is NaN.
MASKED = -1e30

_INT32_MAX = 2**31 - 1


def check_implementation(implementation: str) -> None:
    """Raise ValueError if there is no such implementation."""
    if implementation not in get_args(Implementation):
        valid = ", ".join(map(repr, get_args(Implementation)))
        raise ValueError(f"unknown implementation {implementation!r}; the valid ones are {valid}")


def mosaic_problem(device) -> str | None:
    """Return why a GPU cannot run the Mosaic kernels, or gets them wrong; None if it can."""
    if device.compute_capability != "9.0":
        return (
            "Mosaic kernels need a Hopper GPU (compute capability 9.0), not "
            f"{device.compute_capability}: use 'triton'"
        )
    cuda = re.search(r"cuda (\d+)", device.client.platform_version)
    if cuda is not None and 12080 <= int(cuda[1]) < 12091:
        return (
            "Mosaic kernels need another CUDA than 12.8.0 to 12.9.0, whose compiler gets causal "
            "masks wrong: install \"jax[cuda13]\", or use 'triton'"
        )
    return None


def check_cache(
    k_cache: jax.Array, v_cache: jax.Array, num_heads: int, head_dim: int, layer: jax.Array
) -> None:
    """Raise ValueError unless the caches fit each other, the queries' heads, and `layer`."""
    if k_cache.ndim != 5 or k_cache.shape != v_cache.shape or k_cache.dtype != v_cache.dtype:
        raise ValueError(
            "k_cache and v_cache must both be [layers, pages, page_size, kv_heads, head_dim], but "
            f"are {k_cache.dtype}{k_cache.shape} and {v_cache.dtype}{v_cache.shape}"
        )
    page_size, num_kv_heads, cache_head_dim = k_cache.shape[2:]
    if page_size % 16:
        raise ValueError(f"the page size must be a multiple of 16, not {page_size}")
    if head_dim != cache_head_dim:
        raise ValueError(f"queries have head_dim {head_dim}, but the cache has {cache_head_dim}")
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads are no multiple of {num_kv_heads} KV heads")
    pages = k_cache.shape[1]
    if (most := addressable_pages(k_cache.shape, k_cache.dtype)) < pages:
        raise ValueError(
            f"kernels address at most {most} pages of a cache of {k_cache.dtype}{k_cache.shape}, "
            f"which has {pages} (see `addressable_pages`)"
        )
    if jnp.shape(layer) != ():
        raise ValueError(f"layer must be a scalar, not of shape {jnp.shape(layer)}")


def addressable_pages(cache_shape: tuple[int, ...], cache_dtype: DTypeLike) -> int:
    """Return the most pages, and no more than it has, of a cache that all kernels can address.

    Args:
        cache_shape: `[L, P, S, K, H]` of K's cache, which is V's; on one device.

    There are two limits. Row numbers are int32, and `norm_rope_write` counts half heads, two for
    each position and KV head. Element offsets are taken from 64 bits by Pallas for arrays of more
    than 2**32 bytes, and from a signed 32 for smaller ones, which an 8-bit array of more than 2**31
    outgrows: it must be smaller than that, or larger than 2**32.
    """
    layers, pages, page_size, num_kv_heads, head_dim = cache_shape
    half_rows = 2 * layers * page_size * num_kv_heads  # of a page
    pages = min(pages, _INT32_MAX // half_rows)
    elements = half_rows // 2 * head_dim
    if jnp.dtype(cache_dtype).itemsize == 1 and 2**31 < pages * elements <= 2**32:
        pages = 2**31 // elements
    return pages


def most_tokens(num_heads: int, num_kv_heads: int) -> int:
    """Return the most tokens of a step whose queries, keys and values kernels can address.

    As in the cache, there are two rows for each head of a token, and their numbers are int32.
    """
    return _INT32_MAX // (2 * (num_heads + 2 * num_kv_heads))


def use_interpreter(interpret: bool | None) -> bool:
    """Whether Pallas interprets a kernel: as told, or else if the program does not run on a GPU.

    A program may be compiled for GPUs that are not here; the mesh that it is traced for tells.
    """
    if interpret is not None:
        return interpret
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (device.platform if device else jax.default_backend()) != "gpu"


def cdiv(a, b):
    """Return ceil(a / b) for integers a >= 0, b > 0. (`//` on traced int32 would fix up signs.)"""
    return (a + b - 1) // b if isinstance(a, int) else lax.div(a + (b - 1), jnp.int32(b))


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two >= n."""
    return 1 << (n - 1).bit_length()


# --- Tiles in Triton kernels -----------------------------------------------------------------
#
# Kernels see every array as a matrix of rows and pick rows by number. Triton's tiles have
# power-of-two sides (and at least 16 for a matrix product), so a head dim such as 80 occupies a
# wider tile whose last columns are masked.
#
# Row numbers are int32; see `addressable_pages` for what that and the offsets of elements allow.


def _columns(width: int):
    padded = max(16, next_power_of_2(width))
    cols = jnp.arange(padded)
    return cols, (None if padded == width else cols < width)


def _tile_mask(row_mask, col_mask, shape):
    masks = []
    if row_mask is not None:
        masks.append(jnp.broadcast_to(row_mask[:, None], shape))
    if col_mask is not None:
        masks.append(jnp.broadcast_to(col_mask[None, :], shape))
    return None if not masks else masks[0] if len(masks) == 1 else masks[0] & masks[1]


def load_rows(ref, rows, row_mask=None):
    """Load some rows of the matrix `ref` as a tile; masked rows and padding columns read as 0."""
    cols, col_mask = _columns(ref.shape[1])
    return load_tile(ref, rows, cols, row_mask, col_mask)


def load_tile(ref, rows, cols, row_mask=None, col_mask=None):
    """Load the elements of the matrix `ref` in `rows` and `cols`; masked ones read as 0."""
    mask = _tile_mask(row_mask, col_mask, (rows.shape[0], cols.shape[0]))
    other = None if mask is None else 0.0
    return plgpu.load(ref.at[rows[:, None], cols[None, :]], mask=mask, other=other)


def store_rows(ref, rows, tile, row_mask=None):
    """Write `tile` to the rows of the matrix `ref` that are not masked, in the dtype of `ref`.

    A masked row must not be one that is also written: the interpreter writes the old value there.
    """
    cols, col_mask = _columns(ref.shape[1])
    mask = _tile_mask(row_mask, col_mask, tile.shape)
    plgpu.store(ref.at[rows[:, None], cols[None, :]], tile.astype(ref.dtype), mask=mask)


def cache_row(cache_shape: tuple[int, ...], layer, page, position, kv_head):
    """Return the row of a page's position and head in the cache seen as a `[L*P*S*K, H]` matrix."""
    _, num_pages, page_size, num_kv_heads, _ = cache_shape
    return ((layer * num_pages + page) * page_size + position) * num_kv_heads + kv_head


def to_cache(x, dtype):
    """Convert `x` to the cache's dtype. 8-bit floats saturate, since they would turn into NaN."""
    if jnp.dtype(dtype).itemsize == 1:
        largest = float(jnp.finfo(dtype).max)
        x = jnp.clip(x, -largest, largest)
    return x.astype(dtype)


def product_dtype(dtype, cache_dtype):
    """Return the dtype in which queries are multiplied with the keys and values of a cache.

    It is float16 for an 8-bit cache: from e4m3, one instruction converts two elements, exactly.
    Queries lie far inside float16's range, and softmax weights are at most 1.
    """
    eight_bit = jnp.dtype(cache_dtype).itemsize == 1 and jnp.dtype(dtype).itemsize == 2
    return jnp.dtype(jnp.float16) if eight_bit else jnp.dtype(dtype)


def kv_block_size(page_size: int, dtype) -> int:
    """Return the positions per K/V tile: a divisor of the page size, so that each has one page.

    64 measured best on an H100 in bfloat16. A float32 product keeps its tiles in registers.
    """
    return math.gcd(page_size, 64 if jnp.dtype(dtype).itemsize <= 2 else 16)


def num_stages(block_n: int, cache_shape: tuple[int, ...], dtype, most: int) -> int:
    """Return the depth of the software pipeline: `most`, or what 160 KiB of shared memory hold."""
    tile_bytes = 2 * block_n * max(16, next_power_of_2(cache_shape[-1])) * jnp.dtype(dtype).itemsize
    return max(1, min(most, (160 * 1024) // tile_bytes))


# --- Attention over one block of keys --------------------------------------------------------


def empty_attention(num_rows: int, head_dim: int):
    """Return the state of `attend` before any block: accumulator, running maximum, running sum."""
    return (
        jnp.zeros((num_rows, head_dim), jnp.float32),
        jnp.full((num_rows,), MASKED, jnp.float32),
        jnp.zeros((num_rows,), jnp.float32),
    )


def attend(q, k, v, mask, state, scale: float):
    """Fold one block of keys and values into the attention of the rows of `q`.

    This is the online softmax of FlashAttention (Dao et al., 2022, arXiv:2205.14135, algorithm 1),
    in base 2: exp2 is one instruction, and the change of base, folded into the scale, is free.

    Shapes: q [M, H]; k, v [N, H]; mask [M, N], or None if every row attends to every key.
    v must be finite where the mask is False, since 0 * NaN is NaN; k may be anything there.
    """
    acc, row_max, row_sum = state
    scores = _dot(q, k.astype(q.dtype), contract_last=True) * (scale * LOG2_E)
    if mask is not None:
        scores = jnp.where(mask, scores, MASKED)
    new_max = jnp.maximum(row_max, scores.max(axis=1))
    rescale = jnp.exp2(row_max - new_max)
    weights = jnp.exp2(scores - new_max[:, None])
    acc = acc * rescale[:, None] + _dot(weights.astype(q.dtype), v.astype(q.dtype))
    return acc, new_max, row_sum * rescale + weights.sum(axis=1)


def finish_attention(state):
    """Return the attention `[M, H]` in float32; rows that have seen no block get zeros."""
    acc, _, row_sum = state
    return acc / jnp.where(row_sum > 0, row_sum, 1.0)[:, None]


def _dot(a, b, contract_last: bool = False):
    # HIGHEST: float32 products in full float32 instead of TF32. It changes nothing for bfloat16.
    dims = (((1,), (1 if contract_last else 0,)), ((), ()))
    return lax.dot_general(
        a, b, dims, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
