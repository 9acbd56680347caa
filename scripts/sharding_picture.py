"""A picture of how arrays are cut over the devices of a mesh."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from sharding_report import Layout

COLUMNS = 3


def draw(report: Mapping[str, Any], arrays: Sequence["Layout"], file: Path) -> None:
    """Draw each array as a rectangle of its parts, each with the devices that hold it.

    Devices are numbered through the mesh, row by row.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import colormaps
    from matplotlib import pyplot as plt
    from matplotlib.patches import Rectangle

    rows = -(-len(arrays) // COLUMNS)
    figure, grid = plt.subplots(
        rows, COLUMNS, figsize=(5 * COLUMNS, 2.2 * rows + 0.8), squeeze=False, layout="constrained"
    )
    count = math.prod(report["mesh"].values())
    for axes, array in zip(grid.flat, arrays, strict=False):
        tall, wide = _two_dimensions(array)
        names = [array.axes[k] for k in (tall, wide)]
        shape = [array.shape[k] for k in (tall, wide)]
        for (top, left, height, width), devices in _parts(array, tall, wide).items():
            # A part has the colour of the first device that holds it; what all hold has none.
            color = colormaps["Set3"](devices[0] % 12) if len(devices) < count else "whitesmoke"
            axes.add_patch(
                Rectangle((left, top), width, height, facecolor=color, edgecolor="white")
            )
            axes.text(
                left + width / 2, top + height / 2, _ranges(devices),
                ha="center", va="center", fontsize=8,
            )  # fmt: skip
        axes.set_xlim(0, shape[1])
        axes.set_ylim(shape[0], 0)
        axes.set_xlabel(f"{names[1]} {shape[1]:,}", fontsize=8)
        axes.set_ylabel(f"{names[0]} {shape[0]:,}" if tall != wide else "", fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
        copies = f", {array.copies} copies" if array.copies > 1 else ""
        size = size_text(array.bytes_per_device)
        axes.set_title(f"{array.name}\n{size} a device{copies}", fontsize=9)
    for axes in grid.flat[len(arrays) :]:
        axes.set_axis_off()
    mesh = " x ".join(f"{axis}={size}" for axis, size in report["mesh"].items())
    figure.suptitle(f"{report['model']}, {report['dtype']}, mesh {mesh}: devices of each part")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def size_text(num_bytes: float) -> str:
    """In B, KiB, MiB or GiB."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} GiB"


def _two_dimensions(array: "Layout") -> tuple[int, int]:
    """Which dimensions to draw, as height and width: those that are cut, else the largest."""
    spec = [*array.sharding.spec, *[None] * (len(array.shape) - len(array.sharding.spec))]
    order = sorted(range(len(spec)), key=lambda k: (spec[k] is None, -array.shape[k]))
    chosen = sorted(order[:2])
    return chosen[0], chosen[-1]


def _parts(array: "Layout", tall: int, wide: int) -> dict[tuple[int, int, int, int], list[int]]:
    """(top, left, height, width) of each part -> the devices that hold it."""
    devices = array.sharding.mesh.devices
    assert devices is not None
    number = {device: i for i, device in enumerate(devices.flat)}
    parts: dict[tuple[int, int, int, int], list[int]] = {}
    for device, index in array.sharding.devices_indices_map(array.shape).items():
        spans = [np.arange(n)[part][[0, -1]] for n, part in zip(array.shape, index, strict=True)]
        (top, bottom), (left, right) = spans[tall], spans[wide]
        height = int(bottom - top) + 1 if tall != wide else array.shape[wide]
        box = (int(top) if tall != wide else 0, int(left), height, int(right - left) + 1)
        parts.setdefault(box, []).append(number[device])
    return {box: sorted(holders) for box, holders in parts.items()}


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
