"""H100s to lower programs for, on a machine without a GPU.

The lowerings of Pallas's Triton and Mosaic kernels run in full; XLA's own compiler does not.
"""

import re

import jax
from jax._src.mesh import AbstractDevice  # what Pallas asks for the kind of GPU; not public
from jax.sharding import AbstractMesh, AxisType

H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")


def h100_mesh(**axes: int) -> AbstractMesh:
    """A mesh of H100s with these sizes by axis name."""
    types = (AxisType.Auto,) * len(axes)
    return AbstractMesh(tuple(axes.values()), tuple(axes), types, abstract_device=H100)


def lower_for_h100(jitted, *shapes, mesh: AbstractMesh | None = None) -> str:
    """The text of `jitted` on arguments of these shapes, lowered for the GPUs of `mesh`."""
    with jax.sharding.use_abstract_mesh(mesh or h100_mesh(x=1)):
        return jitted.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def kernels_in(text: str) -> list[str]:
    """The names of the kernels that a lowered program calls."""
    triton = r'custom_call @__gpu\$xla\.gpu\.triton.*?\bname = "(\w+)"'
    mosaic = r"custom_call @mosaic_gpu.*?\\00(?!stable_)(\w+)_mosaic_gpu\\00"
    cuda = r'custom_call @__gpu\$xla\.gpu\.ptx.*?\bkernel_type = "ptx", name = "(\w+)"'
    return [name for kind in (triton, mosaic, cuda) for name in re.findall(kind, text)]
