"""Asks NVIDIA's driver what JAX does not report of the GPUs: their memory, and who shares them."""

import ctypes
from collections.abc import Callable
from typing import NamedTuple, TypeVar

T = TypeVar("T")

MPS_ENABLED = 133  # CU_DEVICE_ATTRIBUTE_MPS_ENABLED in cuda.h


class GpuMemory(NamedTuple):
    """Memory of one GPU in bytes, as all processes together use it."""

    free: int
    total: int


def total_memory() -> list[int]:
    """Bytes of each visible GPU; empty if the driver does not tell. Asking claims no GPU."""

    def ask(cuda: ctypes.CDLL, device: ctypes.c_int) -> int:
        total = ctypes.c_size_t()
        _check(cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device))
        return total.value

    return _ask_each(ask)


def memory() -> list[GpuMemory]:
    """Free and total bytes of each visible GPU, for a process that uses them already.

    Empty if the driver does not tell.
    """

    def ask(cuda: ctypes.CDLL, device: ctypes.c_int) -> GpuMemory:
        context, free, total = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
        _check(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
        _check(cuda.cuCtxPushCurrent_v2(context))
        try:
            _check(cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)))
        finally:
            cuda.cuCtxPopCurrent_v2(ctypes.byref(context))
            cuda.cuDevicePrimaryCtxRelease_v2(device)
        return GpuMemory(free.value, total.value)

    return _ask_each(ask)


def shared_by_mps() -> bool:
    """Whether kernels of other processes may run on the visible GPUs at the same time as ours.

    NVIDIA's MPS lets them. Without it, a GPU runs one process after the other. The answer is False
    if the driver does not tell. Asking claims no GPU.
    """

    def ask(cuda: ctypes.CDLL, device: ctypes.c_int) -> bool:
        enabled = ctypes.c_int()
        _check(cuda.cuDeviceGetAttribute(ctypes.byref(enabled), MPS_ENABLED, device))
        return bool(enabled.value)

    return any(_ask_each(ask))


def _ask_each(ask: Callable[[ctypes.CDLL, ctypes.c_int], T]) -> list[T]:
    """The answer about each visible GPU; none if there is no driver or it answers with an error."""
    cuda = _driver()
    try:
        return [ask(cuda, device) for device in _devices(cuda)] if cuda else []
    except RuntimeError:
        return []


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
