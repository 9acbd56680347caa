"""Compile for H100s on a machine that has none; this needs JAX's CUDA wheels and no GPU.

XLA's whole pipeline runs, with the Triton and Mosaic kernels and ptxas, from a description of the
card. What comes out can be read (collectives, kernels, memory), not run.
"""

import os

import jax
from jax.experimental import topologies

# The fields of xla.GpuTargetConfig that the compiler asks for, with an H100 SXM's values.
DESCRIPTION = """
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3" device_vendor: "NVIDIA Corporation"
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000 device_memory_size: 85017493504 l2_cache_size: 52428800
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  max_blocks_per_multiprocessor: 32
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_core: 233472 shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.19.0"
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def h100s(count: int) -> list:
    """Return `count` H100s of one host, as devices of a mesh that programs are compiled for.

    Call it before JAX has touched a device: JAX is told to look for CPUs only.

    Raises:
        RuntimeError: the CUDA wheels are not installed.
    """
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # which asks for a driver
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=DESCRIPTION, topology=f"1x1x{count}"
    )
    return list(topology.devices)
