"""Caches are a convenience: the engine runs without, says so once, heals what is damaged."""

import logging
import math
import os
import stat
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import pytest

from nanovllm_jax.config import EngineConfig
from nanovllm_jax.engine import cache_folder, runtime
from nanovllm_jax.engine.cache_folder import private_folder, remove_damaged

OTHERS_UID = 12345


@pytest.fixture
def settings(monkeypatch):
    """JAX's settings of its cache, unset, and their values restored."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield lambda: tuple(jax.config.values[name] for name in names)
    for name, value in before.items():
        jax.config.update(name, value)


def configure(checkpoint, caplog):
    """Configure as an engine does; returns its warnings."""
    with caplog.at_level(logging.WARNING, "nanovllm_jax"):
        runtime.configure_runtime(EngineConfig.resolve(checkpoint()))
    return [record.getMessage() for record in caplog.records]


def test_the_default_folder_is_the_users_alone(settings, checkpoint, caplog, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))
    old = os.umask(0o002)
    try:
        assert configure(checkpoint, caplog) == []
    finally:
        os.umask(old)
    folder = tmp_path / "new" / "nanovllm_jax" / "xla"
    assert settings() == (str(folder), 0.0)
    assert {stat.S_IMODE(f.stat().st_mode) for f in (folder, *folder.parents[:2])} == {0o700}


def test_without_a_home_nothing_is_kept_and_that_is_said_once(
    settings, checkpoint, caplog, monkeypatch
):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    [said] = configure(checkpoint, caplog)
    assert "home directory" in said and "JAX_COMPILATION_CACHE_DIR" in said
    assert settings()[0] is None


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o720])
def test_a_folder_that_others_can_write_to_is_not_used(
    settings, checkpoint, caplog, tmp_path, monkeypatch, mode
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "nanovllm_jax" / "xla"
    folder.mkdir(parents=True)
    folder.chmod(mode)
    [said] = configure(checkpoint, caplog)
    assert "others can write" in said and f"chmod 700 {folder}" in said
    assert settings()[0] is None
    assert list(folder.iterdir()) == []


def test_a_folder_of_another_user_is_not_used(tmp_path, monkeypatch):
    """Neither one that is another's, nor one in a place where another could put his own."""
    (tmp_path / "mine").mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: OTHERS_UID)
    with pytest.raises(PermissionError, match="mine belongs to another user"):
        private_folder(tmp_path / "mine", check_parents=False)
    if os.getuid():  # root may own what is above
        with pytest.raises(PermissionError, match="belongs to another user"):
            private_folder(tmp_path / "mine" / "new")


def test_a_folder_in_one_that_all_can_write_to_is_not_used_unless_it_is_sticky(tmp_path):
    tmp_path.chmod(0o777)
    with pytest.raises(PermissionError, match=f"write to {tmp_path}: chmod o-w {tmp_path}"):
        private_folder(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    tmp_path.chmod(0o1777)
    assert private_folder(tmp_path / "a") == tmp_path / "a"


def test_a_symbolic_link_is_what_it_points_to(tmp_path):
    for name, mode in (("private", 0o700), ("open", 0o777)):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(mode)
        (tmp_path / f"to-{name}").symlink_to(tmp_path / name)
    assert private_folder(tmp_path / "to-private") == tmp_path / "private"
    with pytest.raises(PermissionError, match="others can write"):
        private_folder(tmp_path / "to-open")


def test_a_file_in_the_way_ends_nothing(settings, checkpoint, caplog, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "nanovllm_jax").write_text("", "utf-8")
    assert len(configure(checkpoint, caplog)) == 1
    assert settings()[0] is None


def test_a_full_disk_is_read_and_not_written(settings, checkpoint, caplog, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runtime, "check_writable", full)
    [said] = configure(checkpoint, caplog)
    assert "No space left on device" in said
    assert settings() == (str(tmp_path / "nanovllm_jax" / "xla"), math.inf)


def entries(folder):
    """Whole and damaged entries as JAX writes them."""
    whole = zlib.compress(b"\0\0\0\1" + bytes(range(256)) * 50)
    folder.mkdir(exist_ok=True)
    (folder / "jit_a-1-cache").write_bytes(whole)
    for name, damaged in {
        "jit_b-2": whole[: len(whole) // 2], "jit_c-3": b"", "jit_d-4": b"\xff" + whole[1:],
    }.items():  # fmt: skip
        (folder / f"{name}-cache").write_bytes(damaged)
    (folder / "jit_e-5-cache").write_bytes(cache_folder.ZSTD + b"?")  # of an environment with zstd
    (folder / "notes.txt").write_bytes(b"not JAX's")


def test_damaged_entries_are_removed_and_nothing_else(tmp_path):
    entries(tmp_path)
    assert remove_damaged(tmp_path) >= 3
    left = {path.name for path in tmp_path.iterdir()}
    assert left - {"jit_e-5-cache"} == {"jit_a-1-cache", "notes.txt", ".checked"}
    assert remove_damaged(tmp_path) == 0


def test_only_what_is_new_is_looked_into(tmp_path, monkeypatch):
    entries(tmp_path)
    remove_damaged(tmp_path)
    looked = []
    monkeypatch.setattr(cache_folder, "_is_whole", lambda data: not looked.append(data))
    remove_damaged(tmp_path)
    assert not looked
    (tmp_path / "jit_a-1-cache").write_bytes(b"another")
    remove_damaged(tmp_path)
    assert looked == [b"another"]


HEALING = """
import sys, jax, warnings
from nanovllm_jax.config import EngineConfig
from nanovllm_jax.engine.runtime import configure_runtime
found = []
jax.monitoring.register_event_listener(lambda event, **_: found.append(event.rsplit("/")[-1]))
configure_runtime(EngineConfig.resolve(sys.argv[1]))
print(jax.jit(lambda x: x * 2)(jax.numpy.arange(3)), found.count("cache_hits"))
"""


def test_jaxs_cache_heals_at_the_next_start(checkpoint, tmp_path):
    """JAX itself warns of a damaged entry at each start, compiles anew, and leaves it there."""
    folder = tmp_path / "nanovllm_jax" / "xla"
    env = {n: x for n, x in os.environ.items() if not n.startswith(("JAX_COMP", "JAX_PERS"))}
    env |= {"XDG_CACHE_HOME": str(tmp_path)}

    def run():
        command = [sys.executable, "-c", HEALING, str(checkpoint())]
        done = subprocess.run(command, env=env, capture_output=True, encoding="utf-8", check=True)
        return int(done.stdout.split()[-1]), done.stderr

    assert run() == (0, "")
    hits, said = run()
    assert hits > 0 and said == ""
    for entry in folder.glob("*-cache"):
        entry.write_bytes(entry.read_bytes()[:-20])
    none, said = run()
    assert none == 0
    assert said.count("\n") == 1 and "damaged programs" in said and str(folder) in said
    assert run() == (hits, "")
