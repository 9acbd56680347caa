"""Set the environment of every test before JAX is imported; share engines between tests.

The tests run on the CPU with eight fake devices. `JAX_PLATFORMS=cuda pytest tests/gpu` runs those
that need a GPU; elsewhere they are not collected.
"""

import gc
import hashlib
import json
import os
import shutil
import tempfile

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_DEVICES = "--xla_force_host_platform_device_count"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()

# Programs compiled once a session, in subprocesses too, and never taken from an earlier one.
_CACHE = (
    tempfile.mkdtemp(prefix="nanovllm_jax-tests-")
    if ("JAX_COMPILATION_CACHE_DIR" not in os.environ)
    else None
)
if _CACHE:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

collect_ignore = ["gpu"] if os.environ["JAX_PLATFORMS"] == "cpu" else []


def pytest_unconfigure():
    if _CACHE:
        shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(shape, **changes) -> directory of a tiny random model, made once a session."""
    import helpers

    made = {}

    def make(shape="gqa", **options):
        key = json.dumps([shape, options], sort_keys=True)
        if key not in made:
            path = tmp_path_factory.mktemp(shape)
            made[key] = helpers.make_checkpoint(path, shape, **options)
        return made[key]

    return make


@pytest.fixture
def new_engine():
    """Make an engine of a directory, small and in float32 unless told; closed after the test."""
    with _Engines() as engines:
        yield engines.make


@pytest.fixture(scope="module")
def _shared_engines():
    """Not for the whole session: a process may map 65,530 areas of memory (vm.max_map_count), and
    XLA's CPU programs take hundreds of them each. Beyond that jaxlib crashes.
    """
    import jax

    with _Engines() as engines:
        yield engines
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def engine(checkpoint, _shared_engines):
    """engine(shape, **options) -> an engine that tests share, idle and with no cached prefix."""

    made_with = checkpoint

    def get(shape="gqa", *, checkpoint=None, **options):
        llm = _shared_engines.get(made_with(shape, **(checkpoint or {})), options)
        llm.reset_prefix_cache()
        llm.pools[0].check([])
        return llm

    return get


class _Engines:
    """Engines that are closed together."""

    def __init__(self):
        self.made = {}

    def make(self, path, **options):
        import jax

        from nanovllm_jax.llm import LLM

        small = {"max_num_seqs": 4, "max_model_len": 768, "max_num_batched_tokens": 1024}
        small |= {"num_kvcache_blocks": 16, "dtype": "float32"}
        # The programs run for milliseconds: what counts is the time to compile them.
        quick = jax.config.read("jax_disable_most_optimizations")
        jax.config.update("jax_disable_most_optimizations", True)
        try:
            llm = LLM(str(path), **(small | options))
        finally:
            jax.config.update("jax_disable_most_optimizations", quick)
        self.made[len(self.made)] = llm
        return llm

    def get(self, path, options):
        key = json.dumps([str(path), options], sort_keys=True)
        llm = self.made.get(key)
        if llm is None or llm.runner is None or not llm.is_finished():  # a failed test's leavings
            if llm is not None:
                llm.exit()
            self.made[key] = self.make(path, **options)
        return self.made[key]

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        for llm in self.made.values():
            llm.exit()


@pytest.fixture(scope="session")
def oracle(pytestconfig):
    """oracle(directory, prompts, max_tokens) -> transformers' greedy tokens, in float32.

    They are kept in pytest's cache, where an environment without torch finds them.
    """
    models = {}

    def tokens(path, prompts, max_tokens):
        digest = hashlib.sha256(json.dumps([prompts, max_tokens]).encode())
        for file in [*sorted(path.glob("*.safetensors")), path / "config.json"]:
            digest.update(file.read_bytes())
        key = f"nanovllm_jax/oracle/{digest.hexdigest()}"
        cache = getattr(pytestconfig, "cache", None)  # None under -p no:cacheprovider
        found = cache.get(key, None) if cache else None
        if found is None:
            found = compute(path, prompts, max_tokens)
            if cache:
                cache.set(key, found)
        return found

    def compute(path, prompts, max_tokens):
        torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        if path not in models:
            model = transformers.Qwen3ForCausalLM.from_pretrained(path, dtype=torch.float32)
            models[path] = model.eval()
        completions = []
        for ids in prompts:
            ids = torch.tensor([ids])
            out = models[path].generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                eos_token_id=None,
                pad_token_id=0,
            )
            best = torch.stack(out.logits).squeeze(1).topk(2).values
            margin = (best[:, 0] - best[:, 1]).min().item()
            assert margin > 3e-4, f"a tie in the oracle ({margin}): choose another prompt"
            completions.append(out.sequences[0, ids.shape[1] :].tolist())
        return completions

    return tokens
