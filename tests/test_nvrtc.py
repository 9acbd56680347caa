"""CUDA source becomes PTX that NVIDIA's assembler takes, on a machine without a GPU."""

import importlib.util
import locale
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pallas_kernels import _nvrtc

needs_nvrtc = pytest.mark.skipif(bool(_nvrtc.problem()), reason=str(_nvrtc.problem()))
PRIMITIVES = (Path(_nvrtc.__file__).parent / "primitives.cuh").read_text("utf-8")
EVERY = (Path(__file__).parent / "every_primitive.cu").read_text("utf-8")


def assembler():
    """ptxas, of the wheels or the system; None if there is none."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in Path(folder).glob("*/bin/ptxas"):
            return str(path)
    return shutil.which("ptxas")


@needs_nvrtc
def test_every_primitive_assembles(tmp_path):
    ptx = _nvrtc.compile_to_ptx(PRIMITIVES + EVERY, "every_primitive.cu", "compute_90")
    assert ".visible .entry every_primitive(" in ptx
    assert re.search(r"^\.target sm_90$", ptx, re.MULTILINE)
    if assembler() is None:
        pytest.skip("there is no ptxas")
    (tmp_path / "text.ptx").write_text(ptx, "utf-8")
    command = [assembler(), "-arch=sm_90", tmp_path / "text.ptx", "-o", tmp_path / "cubin"]
    subprocess.run(command, check=True)


@needs_nvrtc
def test_an_error_names_the_line():
    with pytest.raises(RuntimeError, match=r"(?s)kernel\.cu: .*kernel\.cu\(2\): error.*nothing"):
        _nvrtc.compile_to_ptx("\nint x = nothing;", "kernel.cu", "compute_90")
    with pytest.raises(RuntimeError, match=r"(?s)kernel\.cu: .*gpu-architecture"):
        _nvrtc.compile_to_ptx("", "kernel.cu", "compute_1")


@needs_nvrtc
def test_the_locale_stays_what_it_was():
    def compiling():
        before = locale.getencoding()
        _nvrtc.compile_to_ptx("// of this test", "kernel.cu", "compute_90")
        return before, locale.getencoding()

    with ThreadPoolExecutor(1) as thread:  # begins in the process's locale; each has its own
        before, after = thread.submit(compiling).result()
    assert before == after


def test_a_newer_version_of_ptx_becomes_one_that_drivers_know():
    header = "//\n\n.version {}\n.target sm_90\n"
    assert _nvrtc._with_older_version(header.format("9.5")) == header.format("8.3")
    assert _nvrtc._with_older_version(header.format("8.10")) == header.format("8.3")
    assert _nvrtc._with_older_version(header.format("8.0")) == header.format("8.0")


def test_without_nvrtc_the_error_says_so(monkeypatch):
    monkeypatch.setattr(_nvrtc, "_library", lambda: None)
    monkeypatch.setattr(_nvrtc, "problem", _nvrtc.problem.__wrapped__)  # not as it was before
    assert "not installed" in _nvrtc.problem()
    with pytest.raises(RuntimeError, match="not installed"):
        _nvrtc.compile_to_ptx("// not compiled before", "kernel.cu", "compute_90")


@needs_nvrtc
def test_a_library_that_cannot_compile_is_a_problem(monkeypatch):
    def fail(*_):
        raise RuntimeError("nothing.cu: failed to open libnvrtc-builtins.so")

    monkeypatch.setattr(_nvrtc, "compile_to_ptx", fail)
    assert "builtins" in _nvrtc.problem.__wrapped__()
