"""Describe the machine: its processor, its GPU, versions, and the energy that it has used."""

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

from nanovllm_jax.tools.compare.results import Machine

BENEATH = {"jax": "jaxlib", "torch": "triton"}  # packages that carry the speed of these


def describe() -> Machine:
    """Describe the machine without initializing a framework's GPU."""
    gpu, driver = _gpu()
    return Machine(
        system=f"{platform.system()} {platform.machine()}", python=platform.python_version(),
        cpu=_cpu_name(), cores=len(os.sched_getaffinity(0)), gpu=gpu, driver=driver,
        load_at_the_start=round(os.getloadavg()[0], 1),
    )  # fmt: skip


def versions(modules: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of those distributions of modules that are installed."""
    found = {}
    for name in (*modules, *(BENEATH[m] for m in modules if m in BENEATH)):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def energy() -> float:
    """Return the joules that the first GPU has used since its driver was loaded; 0 if unknown."""
    if not (visible := _visible()):
        return 0.0
    try:
        import pynvml  # pyright: ignore[reportMissingImports]  # in nvidia-ml-py

        pynvml.nvmlInit()  # does nothing but the first time
        handle = pynvml.nvmlDeviceGetHandleByIndex(int(visible))
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
    except Exception:  # no such module, driver, GPU or counter: NVMLError is not there to name
        return 0.0


def _visible() -> str | None:
    """Return the first GPU that the environment lets a process use, None if it hides them."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    hidden = os.environ.get("JAX_PLATFORMS") == "cpu" or first in ("", "-1")
    return None if hidden else first


def _gpu() -> tuple[str | None, str | None]:
    """Return name and driver of the first visible GPU."""
    if visible := _visible():
        command = f"nvidia-smi -i {visible} --query-gpu=name,driver_version --format=csv,noheader"
        with contextlib.suppress(OSError, subprocess.CalledProcessError, IndexError):
            answer = subprocess.check_output(
                command.split(), stderr=subprocess.DEVNULL, encoding="utf-8"
            )
            name, driver = answer.splitlines()[0].rsplit(", ", 1)
            return name, driver
    return None, None


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        if found := re.search(
            r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8")
        ):
            return found[1].strip()
    return platform.processor() or "unknown"
