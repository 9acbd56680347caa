"""Build CUDA kernels for the CPU, and run them there in any order; see `cuda_machine.cpp`."""

import ctypes
import functools
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

_HERE = Path(__file__).parent
_FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", f"-I{_HERE}", "-c")
# Kernels read bytes of shared memory as any type, and a variable without a value holds garbage.
_KERNEL_FLAGS = ("-O1", "-fno-strict-aliasing", "-ftrivial-auto-var-init=pattern", "-w")
_KERNEL_FLAGS += ("-fsanitize=alignment,bounds,thread", "-fsanitize-recover=all", "-g1")


class MachineError(RuntimeError):
    """The kernel did what a GPU would not do, or not always do well; says where."""


class _Array(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("bytes", ctypes.c_uint64), ("item", ctypes.c_uint64)]


class _Launch(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("blocks", "threads", "shared_bytes", "arrays")),
        ("seed", ctypes.c_uint64),
        ("limit_seconds", ctypes.c_double),
        ("array", ctypes.POINTER(_Array)),
    ]


def problem() -> str | None:
    """Why no kernel can be built here, or None."""
    return None if shutil.which("g++") else "there is no g++"


def build(
    source: str,
    defines: Mapping[str, object],
    *,
    name: str | None = None,
    machine_flags: tuple[str, ...] = (),
):
    """Compile a kernel; a source is compiled once for equal defines and flags.

    Args:
        source: CUDA code, without `primitives.cuh`. Its kernels are `extern "C" __global__`
            functions that take pointers only, and call their shared memory `shared`.
        defines: values by macro.
        name: of the kernel; a source with only one needs none.
        machine_flags: compiler options of the machine itself.

    Returns:
        kernel(grid, threads, shared_bytes, seed, *arrays, limit_seconds=120.0) -> None. It runs
        the kernel on contiguous numpy arrays (bfloat16 as uint16 or ml_dtypes.bfloat16; uint2 and
        uint4 as uint32), and writes into those whose pointers are not `const`. An array that is
        given twice is one piece of memory. `seed` draws the order; 0: warps in turns.

    Raises:
        RuntimeError: g++ refuses the source.
        MachineError: (kernel) it went wrong; the message says where.
    """
    names = re.findall(r'extern\s+"C"\s+__global__[^;{]*?\b(?!__)(\w+)\s*\(', source)
    if name is None:
        (name,) = names
    pairs = tuple((key, str(value)) for key, value in defines.items())
    library = _build(source, tuple(names), pairs, machine_flags)
    return functools.partial(_run, library, name)


@functools.cache
def _build(
    source: str,
    names: tuple[str, ...],
    defines: tuple[tuple[str, str], ...],
    machine_flags: tuple[str, ...],
) -> ctypes.CDLL:
    text = '#include "cuda_machine.h"\n'
    text += "".join(f"#define {key} {value}\n" for key, value in defines)
    text += f'#line 1 "kernel.cu"\n{source}\n'
    text += "".join(f"MACHINE_KERNEL({name})\n" for name in names)
    kernel = _compile(text, *_KERNEL_FLAGS)
    machine = _compile((_HERE / "cuda_machine.cpp").read_text("utf-8"), "-O2", *machine_flags)
    library = kernel.with_name(f"{kernel.stem}-{machine.stem}.so")
    _call("g++", "-shared", kernel, machine, "-o", library)
    return ctypes.CDLL(str(library))


@functools.cache
def _compile(text: str, *flags: str) -> Path:
    name = hashlib.sha256("\n".join((*flags, text)).encode()).hexdigest()[:16]
    source = Path(_folder().name) / f"{name}.cpp"
    source.write_text(text, "utf-8")
    _call("g++", *_FLAGS, *flags, source, "-o", source.with_suffix(".o"))
    return source.with_suffix(".o")


def _call(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        raise RuntimeError(f"g++ refuses the kernel:\n{done.stderr}")


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    """The folder of all that this process builds, which goes when the process ends."""
    return tempfile.TemporaryDirectory(prefix="cuda_machine-")


def _run(
    library: ctypes.CDLL,
    name: str,
    grid: int,
    threads: int,
    shared_bytes: int,
    seed: int,
    *arrays: np.ndarray,
    limit_seconds: float = 120.0,
) -> None:
    for array in arrays:
        assert array.flags.c_contiguous and array.flags.writeable, "contiguous, and not read-only"
    described = (_Array * len(arrays))(*((a.ctypes.data, a.nbytes, a.itemsize) for a in arrays))
    launch = _Launch(grid, threads, shared_bytes, len(arrays), seed, limit_seconds, described)
    error = ctypes.create_string_buffer(20000)
    getattr(library, f"machine_run_{name}")(
        ctypes.byref(launch), error, ctypes.c_uint64(len(error))
    )
    if error.value:
        message = error.value.decode()
        raise MachineError(re.sub(r"@(\w+)", lambda at: _line(library, at[1]), message))


def _line(library: ctypes.CDLL, address: str) -> str:
    """The line of the kernel's source at an address of its code."""
    command = ["addr2line", "-i", "-e", library._name, address]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    # The kernel's own line comes after those of the functions of cuda_machine.h that it calls.
    return re.findall(r"^(?!.*cuda_machine\.h).*:(\d+)", done.stdout, re.MULTILINE)[0]
