"""Devices that are compiled for without being here.

They take the platform's compiler (`jax[cuda12]` or `jax[tpu]`), not its hardware; run with
JAX_PLATFORMS=cpu, and for TPUs TPU_SKIP_MDS_QUERY=1.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

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


def target_config(hardware: ConfigDict) -> str:
    """A GPU of `configs/hardware` as XLA's GpuTargetConfigProto in text form."""
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
    return (
        f"gpu_device_info {{ {' '.join(lines)} }}\n"
        'platform_name: "CUDA"\n'
        "dnn_version_info { major: 9 minor: 10 }\n"
        f'device_description_str: "{hardware.device_kind}"\n'
    )


def devices_a_host(hardware: ConfigDict) -> int:
    """Devices that exchange without a network: GPUs of a server, TPUs of a slice."""
    return int(hardware.get("devices_per_host", 1 << 30))


def devices(hardware: ConfigDict, count: int = 1, hosts: int = 1) -> list[jax.Device]:
    """`count` devices of a kind, to make a mesh of and compile for.

    Args:
      hosts: that GPUs are divided among.
      hardware: what a file of `configs/hardware` returns. TPUs come in its topologies, of
        the smallest of which that has enough the first `count` are given.

    Raises:
      ValueError: no topology has so many.
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
    """What is lowered inside is for a mesh's devices.

    Libraries of kernels ask the default device, which is another here, what it can do.
    """
    device = mesh.devices.flat[0]
    default = mock.patch("jax.extend.backend.get_default_device", return_value=device)
    with jax.set_mesh(mesh), default:
        yield


def in_memory(tree: Any, kind: str) -> Any:
    """Described arrays in a kind of memory, to lower within `compiling_for`.

    Devices that are not here may list no memories, and a sharding over them then drops a
    memory's name; one over a mesh without devices keeps it.
    """

    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding: Any = x.sharding
        mesh = sharding.mesh.abstract_mesh  # its own where it is one
        there = NamedSharding(mesh, sharding.spec, memory_kind=kind)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there)

    return jax.tree.map(place, tree)


def _chips(shape: str) -> int:
    """Of a shape such as 2x2x4."""
    return math.prod(map(int, shape.split("x")))
