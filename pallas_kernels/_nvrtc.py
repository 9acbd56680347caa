"""Compile CUDA source to PTX text with NVRTC, a library that comes with JAX's wheels for CUDA.

It needs no GPU. CUDA's headers do not come with JAX, so the source must not include any.
"""

import ctypes
import ctypes.util
import functools
import importlib.util
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# The version of PTX that programs are marked as. NVRTC writes its own newest one, which a GPU's
# driver refuses if it is the older of the two, even if the text has nothing new. All that sm_90
# has is in 8.0, and 8.3 is known to drivers from CUDA 12.3 on.
_PTX_VERSION = (8, 3)


@functools.cache
def problem() -> str | None:
    """Why nothing can be compiled here; None if it can, which is tried."""
    if _library() is None:
        return "NVRTC (libnvrtc.so) is not installed; jax[cuda13] and jax[cuda12] bring it along."
    try:
        compile_to_ptx('extern "C" __global__ void nothing() {}', "nothing.cu", "compute_90")
    except RuntimeError as error:
        return str(error)
    return None


@functools.cache
def compile_to_ptx(source: str, name: str, architecture: str) -> str:
    """Compile CUDA source, once for equal arguments.

    Args:
        source: CUDA C++17 without includes. Its kernels are `extern "C"`, to keep their names.
        name: what the compiler's messages call the source.
        architecture: the virtual architecture, such as "compute_90".

    Raises:
        RuntimeError: there is no NVRTC, or it refuses the source; then with its messages.
    """
    library = _library()
    if library is None:
        raise RuntimeError(problem())

    def check(result: int) -> None:
        if result:
            library.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise RuntimeError(f"{name}: {library.nvrtcGetErrorString(result).decode()}{log()}")

    def text(kind: str) -> str:
        """The program's log or PTX. Both come with a zero byte at the end."""
        size = ctypes.c_size_t()
        check(getattr(library, f"nvrtcGet{kind}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        check(getattr(library, f"nvrtcGet{kind}")(program, buffer))
        return buffer.value.decode()

    def log() -> str:
        return f"\n{text('ProgramLog')}" if program else ""

    program = ctypes.c_void_p()
    check(
        library.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), name.encode(), 0, None, None
        )
    )
    try:
        options = (ctypes.c_char_p * 2)(
            f"--gpu-architecture={architecture}".encode(), b"--std=c++17"
        )
        # NVRTC leaves its thread in the "C" locale, where Python reads and writes files as ASCII.
        with ThreadPoolExecutor(1) as thread:
            compile_program = library.nvrtcCompileProgram
            check(thread.submit(compile_program, program, len(options), options).result())
        return _with_older_version(text("PTX"))
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _with_older_version(ptx: str) -> str:
    """Mark PTX as of `_PTX_VERSION`, if it is marked as newer."""
    match = re.search(r"^\.version (\d+)\.(\d+)$", ptx, re.MULTILINE)
    if match is None:
        raise RuntimeError("NVRTC's PTX names no version")
    if tuple(map(int, match.groups())) <= _PTX_VERSION:
        return ptx
    major, minor = _PTX_VERSION
    return f"{ptx[: match.start()]}.version {major}.{minor}{ptx[match.end() :]}"


def _library() -> ctypes.CDLL | None:
    """NVRTC: the one of the `nvidia` packages next to JAX, else the system's, else None."""
    # A namespace package, made of the folders of all `nvidia-...` wheels.
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec and spec.submodule_search_locations) or ():
        for package in ("cu13", "cuda_nvrtc"):  # of jax[cuda13] and jax[cuda12]
            for path in sorted(Path(folder, package, "lib").glob("libnvrtc.so.*")):
                return ctypes.CDLL(str(path))
    found = ctypes.util.find_library("nvrtc")
    return ctypes.CDLL(found) if found else None
