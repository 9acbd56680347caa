"""What this process may use of its machine: memory and processors.

A container, a service or a batch job often may use much less than the machine has. The kernel's
control groups (v1 and v2) say so, in every group from the process's own up to the root, and so do
resource limits and the processor affinity.
"""

import os
import resource
from collections.abc import Iterator
from pathlib import Path


def memory_bytes(root: Path = Path("/")) -> int:
    """The memory in bytes that this process may use at most.

    Args:
        root: folder that holds `proc` and `sys`; for tests.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for folder in _control_groups(root, "memory"):
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            limits += [int(text) for text in _read(folder / name).split() if text.isdigit()]
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        if (limit := resource.getrlimit(kind)[0]) != resource.RLIM_INFINITY:
            limits.append(limit)
    return min(limits)


def num_cpus(root: Path = Path("/")) -> int:
    """The number of processors that this process may keep busy.

    Args:
        root: folder that holds `proc` and `sys`; for tests.
    """
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS
    counts = [len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1]
    for folder in _control_groups(root, "cpu"):
        quota = _read(folder / "cpu.max").split() or [
            _read(folder / f"cpu.cfs_{what}_us").strip() for what in ("quota", "period")
        ]
        if all(text.isdigit() for text in quota):  # not "max", -1, or no such file
            counts.append(max(1, -(-int(quota[0]) // int(quota[1]))))
    return min(counts)


def _control_groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of the control groups that this process is in, innermost first, of v1 and v2."""
    groups = {}  # a controller's name -> the group's path; v2 has no name
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, names, path = line.split(":", 2)
        groups |= dict.fromkeys(names.split(","), path)
    for line in _read(root / "proc/self/mountinfo").splitlines():
        mount, _, kind = line.partition(" - ")
        (top, at), (system, _, options) = mount.split()[3:5], kind.split(" ", 2)
        name = controller if system == "cgroup" and controller in options.split(",") else ""
        if name not in groups or (not name and system != "cgroup2"):
            continue
        # In a container the group may be told as the host sees it, or its own be mounted as root.
        inside = Path(groups[name])
        inside = inside.relative_to(top) if inside.is_relative_to(top) else Path()
        folder = root / at.lstrip("/")
        yield from (folder / part for part in (inside, *inside.parents))


def _read(path: Path) -> str:
    """The text of a file, empty if there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
