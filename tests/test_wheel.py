"""The wheel alone: every command of the entry point runs where no clone is."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
COMMANDS = ("", "chat", "bench", "compare", "profile", "sharding")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this clone."""
    folder = tmp_path_factory.mktemp("wheel")
    _call(sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", folder, ROOT)
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def run(wheel, tmp_path_factory):
    """run(program, *arguments): in an environment with the wheel, away from the clone."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False, symlinks=True)
    paths = sysconfig.get_paths(scheme="venv", vars={"base": str(folder), "platbase": str(folder)})
    packages = Path(paths["purelib"])
    _call(sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "-q",
          "--no-deps", "--no-index", wheel)  # fmt: skip
    # The dependencies are those of the running environment. Its own .pth files, one of which makes
    # the clone importable, have no effect from here.
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", "utf-8")

    def run(program, *arguments):
        away = tmp_path_factory.mktemp("away")
        return _call(folder / "bin" / program, *arguments, cwd=away)

    return run


def _call(*command, cwd=None):
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd, env=environment, capture_output=True, encoding="utf-8", timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_it_has_every_file_of_the_packages(wheel):
    files = {
        file.relative_to(ROOT).as_posix()
        for package in ("nanovllm_jax", "pallas_kernels")
        for file in (ROOT / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        assert files <= set(archive.namelist())


def test_the_package_is_the_wheels(run):
    path = run("python", "-c", "import nanovllm_jax, sys; print(nanovllm_jax.__file__, sys.prefix)")
    file, prefix = map(Path, path.split())
    assert file.is_relative_to(prefix) and not file.is_relative_to(ROOT)


def test_every_module_is_importable(run):
    """Apart from the adapters of other engines, which import them."""
    run("python", "-c", (
        "import importlib, pkgutil, nanovllm_jax, pallas_kernels\n"
        "for package in nanovllm_jax, pallas_kernels:\n"
        "    for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        if '.adapters.' not in module.name:\n"
        "            importlib.import_module(module.name)\n"
    ))  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_helps(run, command):
    printed = run("nanovllm-jax", *command.split(), "--help")
    assert printed.startswith(f"usage: nanovllm-jax {command}".rstrip())


def test_one_prompt_on_the_demo_model(run):
    prompt = ("--chat", "What is 2 + 3?", "--max-tokens", "8", "--max-model-len", "64",
              "--num-kvcache-blocks", "2")  # fmt: skip
    printed = run("nanovllm-jax", *prompt)
    assert "5" in printed
    assert run("python", "-m", "nanovllm_jax", *prompt) == printed
