"""Asks NVIDIA's driver how much memory the GPUs have: JAX tells only of its own pool."""

import ctypes
from typing import NamedTuple


class GpuMemory(NamedTuple):
    """Memory of one GPU in bytes, as all processes together use it."""

    free: int
    total: int


def total_memory() -> list[int]:
    """Bytes of each visible GPU; empty without a driver. No GPU is claimed by asking."""
    cuda = _driver()
    if cuda is None:
        return []
    totals = []
    for device in _devices(cuda):
        total = ctypes.c_size_t()
        _check(cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device))
        totals.append(total.value)
    return totals


def memory() -> list[GpuMemory]:
    """Free and total bytes of each visible GPU, for a process that uses them already."""
    cuda = _driver()
    if cuda is None:
        return []
    found = []
    for device in _devices(cuda):
        context, free, total = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
        _check(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
        _check(cuda.cuCtxPushCurrent_v2(context))
        try:
            _check(cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)))
        finally:
            cuda.cuCtxPopCurrent_v2(ctypes.byref(context))
            cuda.cuDevicePrimaryCtxRelease_v2(device)
        found.append(GpuMemory(free.value, total.value))
    return found


def _driver() -> ctypes.CDLL | None:
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return cuda if cuda.cuInit(0) == 0 else None


def _devices(cuda: ctypes.CDLL) -> list[ctypes.c_int]:
    count = ctypes.c_int()
    _check(cuda.cuDeviceGetCount(ctypes.byref(count)))
    devices = []
    for number in range(count.value):
        device = ctypes.c_int()
        _check(cuda.cuDeviceGet(ctypes.byref(device), number))
        devices.append(device)
    return devices


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"the CUDA driver answered with error {status}")
