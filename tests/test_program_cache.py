"""Programs kept on disk: found, loaded without lowering, and never mistaken for one another."""

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import greedy, prompt, tokens
from jax.experimental.compilation_cache import compilation_cache

from nanovllm_jax import SamplingParams
from nanovllm_jax.engine import program_cache
from nanovllm_jax.engine.program_cache import ProgramCache
from nanovllm_jax.engine.programs import Programs, Spec

ARGS, OUTPUTS = ({"x": 0}, 0), (0, {"y": 0})  # of `program`


@pytest.fixture(autouse=True)
def without_the_other_cache():
    """On a CPU, a program that JAX has loaded from its own cache cannot be stored again."""

    def use(whether):
        jax.config.update("jax_enable_compilation_cache", whether)
        compilation_cache.reset_cache()

    used = jax.config.jax_enable_compilation_cache
    use(False)
    yield
    use(used)


def lowered(term=2, size=1000):
    """A lowered ({x}, n) -> (x + term, {y: n * x}), which takes x over."""

    def run(inputs, n):
        x = inputs["x"]
        return x + term, {"y": n * x}

    x = jax.ShapeDtypeStruct((size,), jnp.float32)
    n = jax.ShapeDtypeStruct((), jnp.float32)
    return jax.jit(run, donate_argnums=0).lower({"x": x}, n)


def program(term=2, size=1000):
    """The same, compiled."""
    return lowered(term, size).compile()


def cache(folder, made_from="test"):
    return ProgramCache(Path(folder), jax.devices()[:1], made_from)


def test_a_stored_program_runs_and_donates(tmp_path):
    assert cache(tmp_path / "new").load("step", ARGS, OUTPUTS) is None
    cache(tmp_path / "new").store("step", program())
    loaded = cache(tmp_path / "new").load("step", ARGS, OUTPUTS)
    x = jnp.arange(1000, dtype=jnp.float32)
    place = x.unsafe_buffer_pointer()
    total, rest = loaded({"x": x}, jnp.float32(3))
    assert x.is_deleted() and total.unsafe_buffer_pointer() == place
    np.testing.assert_array_equal(total, np.arange(1000) + 2)
    np.testing.assert_array_equal(rest["y"], 3 * np.arange(1000))
    assert cache(tmp_path / "new").load("other", ARGS, OUTPUTS) is None


def test_a_program_of_several_devices_is_loaded_for_them(tmp_path):
    devices = jax.devices()[:2]
    mesh = jax.sharding.Mesh(np.array(devices), ("i",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("i"))
    x = jax.device_put(jnp.arange(8.0), split)
    compiled = jax.jit(lambda x: x - x.sum(), out_shardings=split).lower(x).compile()
    ProgramCache(tmp_path, devices, "test").store("step", compiled)
    loaded = ProgramCache(tmp_path, devices, "test").load("step", (0,), 0)
    out = loaded(x)
    assert out.sharding == split
    np.testing.assert_array_equal(out, np.arange(8.0) - 28)


def test_what_jax_has_kept_is_not_kept_again(tmp_path, monkeypatch):
    folder, used = str(tmp_path / "jax"), jax.config.jax_compilation_cache_dir
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()
    try:
        for name, kept in (("first", True), ("second", False)):
            jax.clear_caches()
            stored = cache(tmp_path / "own")
            stored.compile(name, lowered(), {})
            assert (stored.load(name, ARGS, OUTPUTS) is not None) == kept
    finally:
        jax.config.update("jax_compilation_cache_dir", used)


def test_what_makes_another_program_makes_another_key(tmp_path, monkeypatch):
    source = tmp_path / "sources" / "layers" / "norm.py"
    source.parent.mkdir(parents=True)
    source.write_text("eps = 1", "utf-8")
    monkeypatch.setattr(program_cache, "SOURCES", (tmp_path / "sources",))
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)

    def key(made_from="test", devices=1):
        return ProgramCache(tmp_path, jax.devices()[:devices], made_from).key

    keys = [key(), key("another"), key(("test", (1, 2))), key(devices=2)]
    source.write_text("eps = 2", "utf-8")
    keys.append(key())
    (source.parent / "new.py").write_text("", "utf-8")
    keys.append(key())
    for name in ("kernel.cu", "kernel.cuh"):
        (source.parent / name).write_text("", "utf-8")
        keys.append(key())
        (source.parent / name).write_text("int x;", "utf-8")
        keys.append(key())
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--some_flag")
    keys.append(key())
    with jax.default_matmul_precision("float32"):
        keys.append(key())
    assert len(set(keys)) == len(keys)

    monkeypatch.delenv("LIBTPU_INIT_ARGS")
    for name in ("new.py", "kernel.cu", "kernel.cuh"):
        (source.parent / name).unlink()
    source.write_text("eps = 1", "utf-8")
    (source.parent / "notes.txt").write_text("no source", "utf-8")
    assert key() == keys[0]


def test_the_sources_are_the_two_packages():
    names = {"nanovllm_jax": "engine/step.py", "pallas_kernels": "fused_linear.py"}
    assert {path.name for path in program_cache.SOURCES} == set(names)
    assert all((path / names[path.name]).is_file() for path in program_cache.SOURCES)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[::-1]])
def test_a_damaged_file_is_named_and_made_anew(tmp_path, damage, caplog):
    cache(tmp_path).store("step", program())
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert cache(tmp_path).load("step", ARGS, OUTPUTS) is None
    assert f"{file.name} cannot be loaded" in caplog.text
    cache(tmp_path).store("step", program())
    assert cache(tmp_path).load("step", ARGS, OUTPUTS) is not None


def test_a_folder_that_cannot_be_made_is_named(tmp_path, caplog):
    (tmp_path / "file").write_text("", "utf-8")
    stored = cache(tmp_path / "file")
    stored.store("step", program())
    assert stored.load("step", ARGS, OUTPUTS) is None
    [record] = caplog.records
    assert "file" in record.getMessage()


def test_a_disk_that_is_full_is_told_once(tmp_path, caplog, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    stored = cache(tmp_path)
    for name in ("one", "two", "three"):
        stored.store(name, program())
    [record] = caplog.records
    assert "No space left" in record.getMessage()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", [0o777, 0o730, 0o702])
def test_what_others_could_have_written_is_not_loaded(tmp_path, caplog, mode):
    """A stored program is code that runs with this user's rights."""
    cache(tmp_path / "own").store("step", program())
    assert stat.S_IMODE((tmp_path / "own").stat().st_mode) == 0o700
    (tmp_path / "own").chmod(mode)
    opened = cache(tmp_path / "own")
    assert opened.load("step", ARGS, OUTPUTS) is None
    opened.store("other", program())
    assert len(list((tmp_path / "own").iterdir())) == 1
    [record] = caplog.records
    assert "others can write" in record.getMessage() and "chmod 700" in record.getMessage()
    (tmp_path / "own").chmod(0o700)
    assert cache(tmp_path / "own").load("step", ARGS, OUTPUTS) is not None


def test_a_file_of_another_user_is_not_loaded(tmp_path, caplog, monkeypatch):
    stored = cache(tmp_path)
    stored.store("step", program())
    monkeypatch.setattr(program_cache.os, "geteuid", lambda: 12345)
    assert stored.load("step", ARGS, OUTPUTS) is None
    assert "belongs to another user" in caplog.text


def test_concurrent_stores_leave_one_whole_file(tmp_path):
    programs = [program(term) for term in (1, 2, 3, 4)]
    stored = cache(tmp_path)
    stored.store("step", programs[0])
    with ThreadPoolExecutor(8) as pool:
        stores = [pool.submit(stored.store, "step", p) for p in programs * 8]
        loads = [pool.submit(stored.load, "step", ARGS, OUTPUTS) for _ in range(8)]
        loaded = [load.result() for load in loads]  # a partial file would give None, and warn
        assert all(store.result() is None for store in stores)
    assert [file.name for file in tmp_path.iterdir()] == [f"{stored.key}-step"]
    for each in (*loaded, stored.load("step", ARGS, OUTPUTS)):
        total, _ = each({"x": jnp.zeros(1000)}, jnp.float32(1))
        assert total[0] in (1, 2, 3, 4) and len(set(total.tolist())) == 1


def test_a_second_runner_loads_every_program_and_lowers_none(
    new_engine, checkpoint, tmp_path, monkeypatch
):
    """As on a GPU; a CPU's runners keep no programs."""
    programs = new_engine(checkpoint(), enforce_eager=True).runner.programs
    assert programs._program_cache(programs.weights) is None
    trace, traced = Spec.trace, []
    monkeypatch.setattr(Spec, "trace", lambda spec: (traced.append(spec), trace(spec))[1])
    monkeypatch.setattr(Programs, "_program_cache", lambda self, weights: cache(tmp_path))

    small = dict(max_num_seqs=2, max_model_len=300, max_num_batched_tokens=300)
    prompts = [prompt(n) for n in (3, 60, 255, 257)]
    params = [greedy()] * len(prompts)
    params[1] = SamplingParams(temperature=1.0, top_k=5, max_tokens=9, seed=3)
    first = new_engine(checkpoint(), **small)
    p = first.runner.programs
    programs = len(p.steps) + len(p.decode_steps) + len(p.samples) + 2 * len(p.samples_all) + 2
    assert len(traced) == programs == len(list(tmp_path.iterdir()))
    want = tokens(first, prompts, params)
    scored = SamplingParams(temperature=1.0, max_tokens=3, seed=3, logprobs=2, prompt_logprobs=1)
    want_scores = first.generate(prompts[:2], scored, use_tqdm=False)

    traced.clear()
    second = new_engine(checkpoint(), **small)
    assert traced == []
    assert tokens(second, prompts, params) == want
    assert second.generate(prompts[:2], scored, use_tqdm=False) == want_scores
    assert tokens(first, prompts, params) == want  # each with a state of its own

    buckets = second.runner.programs.steps
    names = {second.runner.programs.step_spec(bucket, 17).name for bucket in buckets}
    stored = {file.name.partition("-")[2] for file in tmp_path.iterdir()}
    assert names and not names & stored, "other shapes are other programs"
