"""Descriptions of devices to compile for that are not here.

They need the platform's compiler (`jax[cuda12]` or `jax[tpu]`), not its hardware. Run with
JAX_PLATFORMS=cpu, and for TPUs TPU_SKIP_MDS_QUERY=1.
"""

import contextlib
import functools
import math
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from glm_jax.kernels.target import OLDEST_MOSAIC_JAX

# The same for all GPUs of compute capability 7.0 to 9.0 (the CUDA guide's tables).
_EVERY_GPU = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 48 * 1024,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 2**16 - 1,
    "block_dim_limit_z": 2**16 - 1,
    "fpus_per_core": 64,
    "registers_per_core_limit": 2**16,
    "registers_per_block_limit": 2**16,
}
# Of the CUDA toolkit and driver: XLA asks before it makes CUDA graphs of what it captures, and
# takes libraries without a version for too old to have float8 products.
_CUDA_VERSIONS = ("driver_version", "runtime_version", "compile_time_toolkit_version")
_CUDA_VERSION = "12.9.0"
# Where libraries ask for the default device. JAX's Triton backend, from 0.11 on, asks the second:
# it has a table of GPUs by name, and asks the device itself for one that is not in it.
_DEFAULT_DEVICE = (
    "jax.extend.backend.get_default_device",
    "jax._src.interpreters.pxla.get_default_device",
)

_LATEST = ConfigDict(
    {
        "platform": "cuda",
        "device_kind": "any of compute capability 9.0",
        "compute_capability": 9.0,
        "shared_memory_per_multiprocessor": 233472,
        "shared_memory_per_block": 232448,
        "threads_per_multiprocessor": 2048,
        "multiprocessors": 132,
        "memory_bandwidth": 3350 * 10**9,
        "l2_bytes": 50 * 2**20,
        "clock_ghz": 1.755,
        "memory_bytes": 80 * 10**9,
    }
)


def target_config(hardware: ConfigDict) -> str:
    """Describe a GPU of `configs/hardware` as XLA's GpuTargetConfigProto in text form."""
    major, minor = divmod(round(10 * hardware.compute_capability), 10)
    info = _EVERY_GPU | {
        "shared_memory_per_core": hardware.shared_memory_per_multiprocessor,
        "shared_memory_per_block_optin": hardware.shared_memory_per_block,
        "threads_per_core_limit": hardware.threads_per_multiprocessor,
        "core_count": hardware.multiprocessors,
        "memory_bandwidth": hardware.memory_bandwidth,
        "l2_cache_size": hardware.l2_bytes,
        "clock_rate_ghz": hardware.clock_ghz,
        "device_memory_size": hardware.memory_bytes,
    }
    lines = [f"{name}: {value}" for name, value in info.items()]
    lines.append(f"cuda_compute_capability {{ major: {major} minor: {minor} }}")
    lines += [f'{name}: "{_CUDA_VERSION}"' for name in _CUDA_VERSIONS]
    return (
        f"gpu_device_info {{ {' '.join(lines)} }}\n"
        'platform_name: "CUDA"\n'
        "dnn_version_info { major: 9 minor: 10 }\n"
        f'device_description_str: "{hardware.device_kind}"\n'
    )


def devices_per_host(hardware: ConfigDict) -> int:
    """Return how many devices communicate without a network: GPUs of a server, TPUs of a slice."""
    return int(hardware.get("devices_per_host", 1 << 30))


def devices(hardware: ConfigDict, count: int = 1, hosts: int = 1) -> list[jax.Device]:
    """Describe devices of one kind, to make a mesh of and compile for.

    Args:
      hardware: of a file of `configs/hardware`. TPUs come in its topologies: the first `count`
        of the smallest topology that has enough.
      count: number of devices.
      hosts: number of hosts that GPUs are divided among.

    Raises:
      ValueError: no topology has so many devices.
      RuntimeError: the platform's compiler is not installed.
    """
    if hardware.platform == "tpu":
        shapes = [shape for shape in hardware.topologies.split() if _chips(shape) >= count]
        if not shapes:
            raise ValueError(f"{hardware.device_kind}: no topology has {count} chips")
        name = f"{hardware.generation}:{shapes[0]}"
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
    else:
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name=f"{hardware.device_kind} x {count}",
            topology=f"1x{hosts}x{count // hosts}",
            target_config=target_config(hardware),
        )
    return list(topology.devices[:count])


@contextlib.contextmanager
def compiling_for(mesh: Mesh) -> Iterator[None]:
    """Lower programs for a mesh's devices within this context.

    Kernel libraries ask the default device, a different one here, for its capabilities.
    """
    if mesh.devices.flat[0].platform == "gpu":
        _assemble_for_all()
    with _compiling_for(mesh):
        yield


@functools.cache
def _assemble_for_all() -> None:
    """Compile a Mosaic kernel for the latest compute capability.

    A process's first one sets the latest that it can assemble for: those of later GPUs then fail.
    """
    if jax.__version_info__ < OLDEST_MOSAIC_JAX:
        return
    from jax.experimental.pallas import mosaic_gpu

    def kernel(out: Any) -> None:
        layout = mosaic_gpu.Layout.WG_STRIDED((128,), vec_size=1)
        out[...] = mosaic_gpu.layout_cast(jnp.zeros(128, jnp.float32), layout)

    mesh = Mesh(devices(_LATEST), ("x",))
    is_dump = lambda name: name.startswith("MOSAIC_GPU_DUMP")
    quiet = {name: text for name, text in os.environ.items() if not is_dump(name)}
    with mock.patch.dict(os.environ, quiet, clear=True), _compiling_for(mesh):
        zeros = mosaic_gpu.kernel(kernel, out_type=jax.ShapeDtypeStruct((128,), jnp.float32))
        sharding = NamedSharding(mesh, PartitionSpec())
        jax.jit(zeros, out_shardings=sharding).lower().compile()


@contextlib.contextmanager
def _compiling_for(mesh: Mesh) -> Iterator[None]:
    device = mesh.devices.flat[0]
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        for asked in _DEFAULT_DEVICE:
            stack.enter_context(mock.patch(asked, return_value=device))
        yield


def in_memory(tree: Any, kind: str) -> Any:
    """Return descriptions of arrays in a kind of memory, to lower within `compiling_for`.

    Devices that are not here may list no memories, and a sharding over them then drops the
    memory kind; a sharding over an abstract mesh keeps it.

    Args:
      kind: `DEVICE_MEMORY` or `HOST_MEMORY`.
    """

    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding: Any = x.sharding
        mesh = sharding.mesh.abstract_mesh  # itself if it is abstract already
        moved = NamedSharding(mesh, sharding.spec, memory_kind=kind)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=moved)

    return jax.tree.map(place, tree)


def _chips(shape: str) -> int:
    """Count the chips of a shape such as 2x2x4."""
    return math.prod(map(int, shape.split("x")))
