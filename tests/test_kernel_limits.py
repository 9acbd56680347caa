"""What kernels can address, by arithmetic over cards, models and types, and by lowering."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
from h100 import kernels_in, lower_for_h100

from nanovllm_jax.config import EngineConfig
from nanovllm_jax.engine import memory
from nanovllm_jax.engine.programs import Programs
from nanovllm_jax.sharding import make_sharding
from pallas_kernels import addressable_pages, most_tokens, norm_rope_write, paged_decode
from pallas_kernels.mosaic_prefill import MOST_WINDOWS, paged_prefill_mosaic

GIB = 1 << 30
CARDS = {"T4": 15, "A10G": 22, "L40S": 45, "H100": 79, "H200": 140, "B200": 179, "B300": 268}
# layers, KV heads, head dim; and GiB of weights in 16 bits
MODELS = {
    "demo": (6, 2, 64, 0.01),
    "Qwen3-0.6B": (28, 8, 128, 1.2),
    "Qwen3-8B": (36, 8, 128, 15.3),
    "Qwen3-32B": (64, 8, 128, 61),
    "Qwen3-30B-A3B": (48, 4, 128, 57),
    "Qwen2.5-0.5B": (24, 2, 64, 0.9),
    "Llama-3.2-1B": (16, 8, 64, 2.3),
    "TinyLlama": (22, 4, 64, 2.0),
    "SmolLM2-135M": (30, 3, 64, 0.3),
    "one small head": (1, 1, 16, 0.001),
}
PAGE = 256
DTYPES = {"fp8": jnp.float8_e4m3fn, "bfloat16": jnp.bfloat16, "float32": jnp.float32}


def sized(card, model, dtype):
    """Blocks as memory alone would have them, and as kernels can address them."""
    layers, heads, head_dim, weights = MODELS[model]
    block = 2 * layers * PAGE * heads * head_dim * jnp.dtype(DTYPES[dtype]).itemsize
    total = CARDS[card] * GIB
    sizes = memory.Sizes(total, int(0.95 * total), int(weights * GIB))
    budget = memory.gpu_budget(sizes, GIB, 0.9)
    blocks = memory.num_cache_blocks(budget, block)
    shape = (layers, blocks, PAGE, heads, head_dim)
    return shape, addressable_pages(shape, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("card", CARDS)
def test_whatever_fits_a_card_is_cut_to_what_kernels_address(card, model, dtype):
    if MODELS[model][3] > 0.75 * CARDS[card]:
        pytest.skip("the weights alone do not fit")
    (layers, blocks, _, heads, head_dim), pages = sized(card, model, dtype)
    assert 0 < pages <= blocks
    rows = layers * pages * PAGE * heads
    assert 2 * rows <= 2**31 - 1, "rows of half a head are numbered in int32"
    bytes_, elements = rows * head_dim * jnp.dtype(DTYPES[dtype]).itemsize, rows * head_dim
    assert bytes_ > 2**32 or elements <= 2**31, "offsets are int32 up to 2**32 bytes"
    at_once = addressable_pages((layers, pages, PAGE, heads, head_dim), DTYPES[dtype])
    assert at_once == pages, "and what was cut is not cut again"


def test_the_limits_cost_no_cache_by_default():
    """On cards up to an H200 and for models in use, nothing lies between 2**31 and 2**32 bytes."""
    for card, model in itertools.product(list(CARDS)[:5], list(MODELS)[:-1]):
        if MODELS[model][3] < 0.8 * CARDS[card]:
            shape, pages = sized(card, model, "fp8")
            assert pages == shape[1], (card, model)


@pytest.mark.parametrize("elements", [2**31, 2**31 + 2**20, 2**32, 2**32 + 2**20])
def test_kernels_lower_at_the_limits_and_refuse_what_lies_between(elements):
    layers, heads, head_dim = 8, 4, 128
    pages = elements // (layers * PAGE * heads * head_dim)
    cache = jax.ShapeDtypeStruct((layers, pages, PAGE, heads, head_dim), jnp.float8_e4m3fn)
    q = jax.ShapeDtypeStruct((4, 8, head_dim), jnp.bfloat16)
    numbers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    args = (q, cache, cache, numbers((4, 4)), numbers((4,)), numbers(()))
    decode = jax.jit(functools.partial(paged_decode, scale=1.0, implementation="triton"))
    qkv = jax.ShapeDtypeStruct((4, heads, 4, head_dim), jnp.bfloat16)
    norm = jax.ShapeDtypeStruct((head_dim,), jnp.bfloat16)
    cos = jax.ShapeDtypeStruct((4, head_dim // 2), jnp.float32)
    new = (qkv, norm, norm, cos, cos, numbers((4,)), cache, cache, numbers(()))
    write = jax.jit(functools.partial(norm_rope_write, eps=1e-6, implementation="triton"))
    if 2**31 < elements <= 2**32:
        with pytest.raises(ValueError, match="kernels address at most"):
            lower_for_h100(decode, *args)
        return
    assert "paged_decode" in kernels_in(lower_for_h100(decode, *args))
    assert "norm_rope_write" in kernels_in(lower_for_h100(write, *new))


@pytest.mark.parametrize("tokens", [16384, 1 << 20, 1 << 23])
def test_mosaics_prefill_sorts_the_tiles_of_any_step(tokens, monkeypatch):
    """Sort keys have 11 bits for a window of tiles; more tiles make larger windows."""
    from pallas_kernels import mosaic_prefill

    windows = []
    schedule = mosaic_prefill._schedule

    def spy(*args, window, **options):
        windows.append(window)
        return schedule(*args, window=window, **options)

    monkeypatch.setattr(mosaic_prefill, "_schedule", spy)
    q = jax.ShapeDtypeStruct((tokens, 64, 128), jnp.bfloat16)
    cache = jax.ShapeDtypeStruct((1, 64, PAGE, 8, 128), jnp.bfloat16)
    numbers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    prefill = functools.partial(paged_prefill_mosaic, scale=1.0)
    shapes = (numbers((4, 4)), numbers((5,)), numbers((4,)), numbers(()))
    lower_for_h100(jax.jit(prefill), q, cache, cache, *shapes)
    tiles = mosaic_prefill._max_tiles(tokens, 4, 64)
    assert (tiles - 1) // windows[0] < MOST_WINDOWS
    if tokens == 16384:
        assert windows == [132 * 4 // 32], "what was measured stays as it was"


def test_the_most_tokens_of_a_step_have_rows_in_32_bits():
    tokens = most_tokens(32, 8)
    assert 2 * tokens * (32 + 16) <= 2**31 - 1 < 2 * (tokens + 1) * (32 + 16)
    assert tokens > 20_000_000


# --- in the options' words ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kvcache_blocks": 1 << 20}, "num_kvcache_blocks must be at most 1048575: .*float32"),
        ({"num_kvcache_blocks": 1 << 40}, "num_kvcache_blocks must be at most 1048575"),
        ({"kvcache_block_size": 1 << 30}, "kvcache_block_size must be smaller.*, got 1073741824"),
        ({"max_num_batched_tokens": 1 << 29}, "max_num_batched_tokens must be at most 107374182"),
        ({"max_num_seqs": 1 << 29}, "max_num_seqs must be at most 107374182"),
        (
            {"max_model_len": 1 << 25, "max_num_batched_tokens": 1 << 25},
            "max_model_len must be at most 16777216",
        ),
    ],
)
def test_a_size_that_kernels_cannot_address_is_refused(checkpoint, options, message):
    path = checkpoint(max_position_embeddings=1 << 30)
    config = EngineConfig.resolve(path, "cpu", **options)
    with pytest.raises(ValueError, match=message):
        Programs(config, make_sharding(config.mesh_shape, config.sharding_rules))


def test_blocks_between_the_limits_of_an_8_bit_cache_are_refused(checkpoint):
    path = checkpoint(num_hidden_layers=4, head_dim=128)  # 2 KV heads: 2**18 elements a block
    for blocks, refused in ((8192, False), (8193, True), (16384, True), (16385, False)):
        config = EngineConfig.resolve(path, "cpu", kv_cache_dtype="fp8", num_kvcache_blocks=blocks)
        sharding = make_sharding(config.mesh_shape, config.sharding_rules)
        if refused:
            with pytest.raises(ValueError, match="num_kvcache_blocks must be at most 8192"):
                Programs(config, sharding)
        else:
            assert Programs(config, sharding).addressable_blocks(blocks) == blocks
