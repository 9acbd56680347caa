"""All layers of a decode step of a few sequences: one CUDA kernel on Hopper, and its reference."""

import functools
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels import _nvrtc
from pallas_kernels._common import LOG2_E, check_cache
from pallas_kernels.paged_decode import decode_step

# XLA's own custom call for a kernel that comes as PTX text. It passes the kernel the addresses of
# all operands, then those of all results.
_TARGET = "__gpu$xla.gpu.ptx"
_SOURCES = [Path(__file__).with_name(name) for name in ("primitives.cuh", "decode_layers.cu")]
_THREADS = 288  # threads of a block: eight computing warps and a copying one

# Blocks of the kernel, each of which needs a multiprocessor. An H100 SXM has 132, but the sizes of
# models divide by powers of two.
BLOCKS = 128
MOST_SHARED = 232_448  # bytes of shared memory that a block may have on such a GPU
MOST_ROWS = 16  # most sequences: the height of a tensor core's tile
MOST_LAYERS = 64  # most layers: a bit for each in the mask of those without RoPE

Implementation = Literal["cuda", "xla"]


class LayerWeights(NamedTuple):
    """The weights of L layers, stacked: N query and K KV heads of size H, G = N / K."""

    input_norm: Float[Array, "L D"]
    qkv: Float[Array, "L K G+2 H D"]  # a KV head has its query heads, then its key, then its value
    qkv_bias: Float[Array, "L K G+2 H"] | None
    q_norm: Float[Array, "L H"] | None
    k_norm: Float[Array, "L H"] | None
    o: Float[Array, "L D N H"]
    post_norm: Float[Array, "L D"]
    gate_up: Float[Array, "L 2 F D"]
    down: Float[Array, "L D F"]


class Sizes(NamedTuple):
    """The sizes that the kernel is compiled for; the names are those of its #defines."""

    batch: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    pages: int
    page: int
    table: int  # entries of a sequence's block table

    @classmethod
    def of(cls, weights: LayerWeights, k_cache: Any, batch: int, table: int) -> "Sizes":
        """Read the sizes off arrays, or whatever else has their shapes."""
        _, kv_heads, per_group, head_dim, _ = weights.qkv.shape
        layers, hidden, ffn = weights.down.shape
        heads, (pages, page) = kv_heads * (per_group - 2), k_cache.shape[1:3]
        return cls(batch, layers, hidden, heads, kv_heads, head_dim, ffn, pages, page, table)


class Plan(NamedTuple):
    """How the kernel divides its work; the first four are #defines of the same names."""

    blocks: int  # thread blocks, one per multiprocessor, which must all run at the same time
    splits: int  # parts of each context, attended to by different blocks
    stages: int  # stages of the ring in shared memory
    in_flight: int  # most stages that are being filled at the same time
    shared_bytes: int  # shared memory of a block
    mail_words: int  # words of 4 bytes through which blocks exchange activations

    @classmethod
    def of(cls, sizes: Sizes) -> "Plan | None":
        """The plan for some sizes; None if they are too large.

        The formulas are those of decode_layers.cu, which says what the arrays are for.
        """
        s, warps, unit, units = sizes, 8, 8, 8
        group, attended = s.heads // s.kv_heads, s.heads * s.head_dim
        qkv = attended + 2 * s.kv_heads * s.head_dim
        if s.batch * s.kv_heads > BLOCKS:
            return None
        splits = 1
        while splits < 16 and 2 * splits * s.batch * s.kv_heads <= BLOCKS:
            splits *= 2

        stage = unit * (2 * 1024 + 64)
        widest = max(s.hidden, attended, s.ffn)
        row = 2 * widest + (0 if widest % 64 else 64)
        sums = max(
            warps * units * s.batch * unit,  # of a product
            (group + 2) * s.head_dim + warps * group * (s.head_dim + 2),  # of attention
        )
        own_rows, pieces = unit * math.ceil(s.hidden / unit / BLOCKS), math.ceil(s.hidden / 256)
        beside = s.batch * row + 2 * (8 + 2) * s.head_dim
        beside += 4 * (sums + (own_rows + pieces + 1) * s.batch)
        beside += -beside % 8
        stages = min(12, (MOST_SHARED - beside) // (stage + 16))
        if stages < 4:
            return None

        mail = s.batch * (2 * s.hidden + qkv + s.ffn + splits * attended) // 2
        mail += s.batch * s.heads * math.ceil(splits / 4) * 4
        # Copies that are requested long before their use delay the exchanges, most of all where
        # many words are exchanged. But the more a block reads in a layer, the more copies must be
        # under way.
        weights = 2 * s.hidden * (qkv + attended + 3 * s.ffn)
        least = 2 if s.batch <= 4 else 1
        in_flight = min(4, max(least, round(weights / BLOCKS / 400_000)))
        shared = stages * (stage + 16) + beside
        return cls(BLOCKS, splits, stages, in_flight, shared, s.layers * mail)


def plan_decode_layers(weights: LayerWeights, k_cache: Any, batch: int, device: Any) -> Plan | None:
    """How the kernel would compute a step of `batch` sequences; None if it does not fit.

    It fits bfloat16 weights and caches of dense models on one Hopper GPU with enough
    multiprocessors, and batches of at most `MOST_ROWS`, where NVRTC is installed.

    Args:
        weights, k_cache: arrays, or whatever else has their shapes and dtypes.
        device: the one that the step is compiled for, which need not be there.
    """
    s = Sizes.of(weights, k_cache, batch, 0)
    dtypes = {x.dtype for x in jax.tree.leaves((weights, k_cache))}
    fits = (
        dtypes == {jnp.dtype(jnp.bfloat16)}
        and 1 <= batch <= MOST_ROWS
        and s.layers <= MOST_LAYERS
        and s.head_dim in (64, 128)
        and s.heads // s.kv_heads <= 8
        and s.hidden % 32 == s.ffn % 32 == s.heads * s.head_dim % 32 == 0
        and s.page % 8 == 0
    )
    if not fits or device.platform != "gpu" or device.compute_capability != "9.0":
        return None
    if device.core_count < BLOCKS or _nvrtc.problem() is not None:
        return None
    return Plan.of(s)


@functools.partial(
    jax.jit,
    static_argnames=("eps", "scale", "layers_without_rope", "implementation", "plan"),
    donate_argnames=("k_cache", "v_cache"),
)
def decode_layers(
    x: Float[Array, "B D"],
    weights: LayerWeights,
    cos: Float[Array, "B half"],
    sin: Float[Array, "B half"],
    slot_mapping: Int32[Array, " B"],
    k_cache: Float[Array, "L P S K H"],
    v_cache: Float[Array, "L P S K H"],
    block_tables: Int32[Array, "B W"],
    context_lens: Int32[Array, " B"],
    *,
    eps: float,
    scale: float,
    layers_without_rope: tuple[int, ...] = (),
    implementation: Implementation,
    plan: Plan | None = None,
) -> tuple[Float[Array, "B D"], Float[Array, "L P S K H"], Float[Array, "L P S K H"]]:
    """Return the hidden states after all layers, not yet normed, and the caches with the new K, V.

    The caches are updated in place and those passed in are consumed: go on with the ones returned.

    A step of a few sequences reads each weight once and computes little with it, so it should take
    as long as reading takes. Kernels that follow one another cannot reach that, since each begins
    by waiting for memory. The CUDA kernel ("cuda") stays on the GPU from the first layer to the
    last and fetches the next weights while its blocks exchange what they have computed. "xla" is
    its reference in plain JAX, which rounds where a step of plain layers does.

    Args:
        x: the tokens' embeddings.
        cos, sin: float32, of each sequence's position times the H/2 inverse frequencies.
        slot_mapping: the position in the cache, page * S + offset, that each key and value is
            written to, the same in each layer; a negative one writes nothing.
        block_tables: page ids of each sequence in order. Entries past the context are never used.
        context_lens: positions to attend to, the new one included; 0 marks a padding row, whose
            result means nothing.
        eps: the epsilon of all norms.
        scale: the factor of the scores of attention.
        layers_without_rope: numbers of the layers that rotate nothing.
        plan: from `plan_decode_layers`; "cuda" needs it.

    Raises:
        ValueError: the shapes do not fit each other, or the implementation is unknown.
        RuntimeError: the CUDA source cannot be compiled.
    """
    if implementation not in get_args(Implementation):
        raise ValueError(f"unknown implementation {implementation!r}; valid: 'cuda', 'xla'")
    sizes = Sizes.of(weights, k_cache, len(x), block_tables.shape[1])
    _check(sizes, x, weights, cos, sin, slot_mapping, k_cache, v_cache, block_tables, context_lens)
    batch = cos, sin, slot_mapping, k_cache, v_cache, block_tables, context_lens
    options = {"eps": eps, "scale": scale, "layers_without_rope": layers_without_rope}
    if implementation == "xla":
        return _decode_layers_xla(x, weights, *batch, **options)
    if plan is None:
        raise ValueError("the CUDA kernel needs a plan (plan_decode_layers)")
    return _decode_layers_cuda(x, weights, *batch, sizes=sizes, plan=plan, **options)


def _check(
    s: Sizes, x, weights, cos, sin, slot_mapping, k_cache, v_cache, block_tables, context_lens
) -> None:
    """Raise ValueError unless these arguments of `decode_layers` fit each other."""
    check_cache(k_cache, v_cache, s.heads, s.head_dim, jnp.int32(0))
    if s.layers != k_cache.shape[0] or s.kv_heads != k_cache.shape[3]:
        raise ValueError(f"qkv {weights.qkv.shape} does not fit the cache {k_cache.shape}")
    if (weights.q_norm is None) != (weights.k_norm is None):
        raise ValueError("there must be both of q_norm and k_norm, or none")
    per_group = s.heads // s.kv_heads + 2
    norm, head_norm, half = (s.layers, s.hidden), (s.layers, s.head_dim), (s.batch, s.head_dim // 2)
    shapes = {
        "input_norm": norm,
        "qkv": (s.layers, s.kv_heads, per_group, s.head_dim, s.hidden),
        "qkv_bias": (s.layers, s.kv_heads, per_group, s.head_dim),
        "q_norm": head_norm,
        "k_norm": head_norm,
        "o": (s.layers, s.hidden, s.heads, s.head_dim),
        "post_norm": norm,
        "gate_up": (s.layers, 2, s.ffn, s.hidden),
        "down": (s.layers, s.hidden, s.ffn),
        "x": (s.batch, s.hidden),
        "cos": half,
        "sin": half,
        "slot_mapping": (s.batch,),
        "block_tables": (s.batch, s.table),
        "context_lens": (s.batch,),
    }
    given = weights._asdict() | {
        "x": x, "cos": cos, "sin": sin, "slot_mapping": slot_mapping,
        "block_tables": block_tables, "context_lens": context_lens,
    }  # fmt: skip
    for name, value in given.items():
        if value is not None and value.shape != shapes[name]:
            raise ValueError(f"{name} must be of shape {shapes[name]}, but is {value.shape}")


# --- XLA -------------------------------------------------------------------------------------


def _decode_layers_xla(
    x, weights, cos, sin, slot_mapping, k_cache, v_cache, block_tables, context_lens, *,
    eps, scale, layers_without_rope,
):  # fmt: skip
    """Compute one layer after the other, as the model's own layers do in plain JAX."""
    no_rope = jnp.ones_like(cos), jnp.zeros_like(sin)  # turns by nothing
    for i in range(len(weights.qkv)):
        layer = jax.tree.map(lambda stack, i=i: stack[i], weights)
        angles = no_rope if i in layers_without_rope else (cos, sin)
        qkv = _product(_rms_norm(x, layer.input_norm, eps), layer.qkv)
        if layer.qkv_bias is not None:
            qkv += layer.qkv_bias
        attended, k_cache, v_cache = decode_step(
            qkv, layer.q_norm, layer.k_norm, *angles, slot_mapping, k_cache, v_cache,
            block_tables, context_lens, jnp.int32(i), eps=eps, scale=scale, implementation="xla",
        )  # fmt: skip
        x += _product(attended, layer.o)
        gate_up = _product(_rms_norm(x, layer.post_norm, eps), layer.gate_up)
        x += _product(jax.nn.silu(gate_up[:, 0]) * gate_up[:, 1], layer.down)
    return x, k_cache, v_cache


def _rms_norm(x, weight, eps):
    """RMSNorm (arXiv:1910.07467): the mean in float32, the product in x's type."""
    x32 = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return weight * (x32 * scale).astype(x.dtype)


def _product(x, weight):
    """Multiply x [B, *in] by a weight [*out, *in]: summed up in float32, rounded once."""
    inputs = x.ndim - 1
    dims = tuple(range(1, x.ndim)), tuple(range(weight.ndim - inputs, weight.ndim))
    return lax.dot_general(
        x, weight, (dims, ((), ())),
        precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32,
    ).astype(x.dtype)  # fmt: skip


# --- CUDA ------------------------------------------------------------------------------------


def _decode_layers_cuda(
    x, weights, cos, sin, slot_mapping, k_cache, v_cache, block_tables, context_lens, *,
    sizes: Sizes, plan: Plan, eps, scale, layers_without_rope,
):  # fmt: skip
    # A word that is zero has not arrived yet, so each call must begin with zeros.
    mail = jnp.zeros(plan.mail_words, jnp.uint32)
    absent = jnp.zeros(1, x.dtype)
    operands = [
        x, *(absent if weight is None else weight for weight in weights), cos, sin, slot_mapping,
        block_tables, context_lens, k_cache, v_cache, mail,
    ]  # fmt: skip
    results = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, k_cache, v_cache, mail)]
    updated = len(operands) - 3  # caches and mail are the last operands, and results from 1 on
    call = jax.ffi.ffi_call(
        _TARGET, results, input_output_aliases={updated + i: 1 + i for i in range(3)}
    )
    values = defines(
        sizes, plan, eps=eps, scale=scale, layers_without_rope=layers_without_rope,
        qkv_bias=weights.qkv_bias is not None, qk_norm=weights.q_norm is not None,
    )  # fmt: skip
    source = "".join(f"#define {name} {value}\n" for name, value in values.items())
    source += "\n".join(path.read_text("utf-8") for path in _SOURCES)
    hidden, k_cache, v_cache, _ = call(
        *operands,
        name="decode_layers",
        kernel_type="ptx",
        kernel_data=_nvrtc.compile_to_ptx(source, "decode_layers.cu", "compute_90"),
        grid_x=np.int32(plan.blocks), grid_y=np.int32(1), grid_z=np.int32(1),
        block_x=np.int32(_THREADS), block_y=np.int32(1), block_z=np.int32(1),
        shared_mem_bytes=np.int32(plan.shared_bytes),
    )  # fmt: skip
    return hidden, k_cache, v_cache


def defines(
    sizes: Sizes,
    plan: Plan,
    *,
    eps: float,
    scale: float,
    layers_without_rope: tuple[int, ...],
    qkv_bias: bool,
    qk_norm: bool,
) -> dict[str, str]:
    """What the kernel's source takes for granted, as the names and values of #defines."""
    numbers = sizes._asdict() | plan._asdict()
    del numbers["shared_bytes"], numbers["mail_words"]  # the source has its own formulas
    numbers |= {"qkv_bias": int(qkv_bias), "qk_norm": int(qk_norm)}
    return {name.upper(): str(value) for name, value in numbers.items()} | {
        "EPS": _float(eps),
        "SCALE_LOG2E": _float(scale * LOG2_E),
        "NO_ROPE_BITS": f"{sum(1 << layer for layer in layers_without_rope):#x}ull",
    }


def _float(value: float) -> str:
    """The literal of a float in C."""
    return f"{float(value)!r}f"
