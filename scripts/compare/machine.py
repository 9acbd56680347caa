"""The machine: its processor, GPU and versions, its limits, and the energy that it has used."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

# Dense bfloat16 products measured on such cards, in TFLOP/s. Their bandwidths are in bench.py.
PEAK = {"H100": 790, "H200": 790}


def describe() -> dict[str, Any]:
    """What the report says of the machine; nothing of it initializes a framework's GPU."""
    gpu = gpu_name()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": gpu,
        "load at the start": round(os.getloadavg()[0], 1),  # processes wanting to run, other's too
        "driver": _nvml("nvmlSystemGetDriverVersion") if gpu else None,
    }


def versions(modules: tuple[str, ...]) -> dict[str, str]:
    """Versions of the distributions that those modules come from, those that are installed."""
    found = {}
    below = {"jax": ("jaxlib",), "torch": ("triton",)}  # what carries their speed
    for name in (*modules, *(n for m in modules for n in below.get(m, ()))):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def gpu_name() -> str | None:
    """The first visible GPU's name; None without one."""
    if _hidden():
        return None
    if name := _nvml("nvmlDeviceGetName", device=True):
        return name
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return answer.splitlines()[0] if answer.strip() else None
    return None


def energy() -> float | None:
    """Joules that the first GPU has used since its driver was loaded; None where it cannot say."""
    millijoules = _nvml("nvmlDeviceGetTotalEnergyConsumption", device=True)
    return None if millijoules is None else millijoules / 1e3


def _hidden() -> bool:
    """Whether the environment says to use no GPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    return os.environ.get("JAX_PLATFORMS") == "cpu" or visible in ("", "-1")


def _nvml(function: str, device: bool = False) -> Any:
    """What NVML answers, of the first visible GPU with `device`; None if it does not."""
    if _hidden():
        return None
    try:
        import pynvml  # pyright: ignore[reportMissingImports]  # of nvidia-ml-py

        pynvml.nvmlInit()
    except Exception:  # no such module, no driver, no GPU: an NVMLError of several kinds
        return None
    try:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        index = int(visible) if visible.isdigit() else 0
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index)] if device else []
        answer = getattr(pynvml, function)(*handles)
        return answer.decode() if isinstance(answer, bytes) else answer
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"
