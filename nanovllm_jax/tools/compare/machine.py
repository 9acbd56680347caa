"""Describe the machine: its processor, its GPU, versions, and the energy that it has used."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

from nanovllm_jax.tools.compare.results import Machine

BENEATH = {"jax": ("jaxlib",), "torch": ("triton",)}  # what carries the speed of these


def describe() -> Machine:
    """Describe the machine without initializing a framework's GPU."""
    gpu, driver = _gpu()
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        gpu=gpu,
        load_at_the_start=round(os.getloadavg()[0], 1),
        driver=driver,
    )


def versions(modules: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of those distributions of modules that are installed."""
    found = {}
    for name in (*modules, *(n for m in modules for n in BENEATH.get(m, ()))):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def energy() -> float | None:
    """Return the joules that the first GPU has used since its driver was loaded, if known."""
    if (visible := _visible()) is None:
        return None
    try:
        import pynvml  # pyright: ignore[reportMissingImports]  # in nvidia-ml-py

        pynvml.nvmlInit()
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(int(visible))
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # no such module, driver, GPU or counter: NVMLError is not there to name
        return None


def _visible() -> str | None:
    """Return the first GPU that the environment lets a process use, None if it hides them."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    hidden = os.environ.get("JAX_PLATFORMS") == "cpu" or first in ("", "-1")
    return None if hidden else first


def _gpu() -> tuple[str | None, str | None]:
    """Return name and driver of the first visible GPU."""
    if (visible := _visible()) is not None:
        command = ["nvidia-smi", "-i", visible, "--query-gpu=name,driver_version"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            answer = subprocess.run(
                [*command, "--format=csv,noheader"], capture_output=True, text=True, check=True
            )
            if lines := answer.stdout.splitlines():
                name, driver = lines[0].rsplit(", ", 1)
                return name, driver
    return None, None


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"
