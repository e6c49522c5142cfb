"""What device a program is compiled for, and what kernels require of it."""

from typing import Any

import jax
from jax.extend import backend

TRITON_CAPABILITY = 8.0  # the minimum of Triton
FLOAT8_CAPABILITY = 8.9  # the first with float8 products
WGMMA_CAPABILITY = 9.0  # the only one with wgmma: later devices have other matrix instructions
OLDEST_MOSAIC_JAX = (0, 11)  # whose Mosaic GPU the project's kernels are written in


def platform() -> str:
    """Return the platform of the surrounding mesh's devices, else of the default device.

    Returns:
      JAX's name for lowering: "cpu", "cuda", "tpu".
    """
    name = (_of_mesh() or backend.get_default_device()).platform
    return "cuda" if name == "gpu" else name


def device_kind() -> str:
    """Return the kind of the surrounding mesh's devices, else of the default device.

    Returns:
      JAX's name for it, such as "NVIDIA H200".
    """
    return str((_of_mesh() or backend.get_default_device()).device_kind)


def compute_capability() -> float:
    """Return the compute capability of the surrounding mesh's GPUs, else of the first GPU.

    GPUs that are compiled for without being here count if `planning.topology.compiling_for` has
    made one the default device.

    Returns:
      Such as 8.6; 0 without a GPU.
    """
    kind = getattr(_of_mesh(), "device_kind", None)
    for device in (backend.get_default_device(), *jax.devices()):
        if device.platform == "gpu" and kind in (None, device.device_kind):
            return float(device.compute_capability)
    return 0.0


def _of_mesh() -> Any:
    """Return the surrounding mesh's device, as it is described; None without a mesh."""
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)


def has_wgmma(device: Any) -> bool:
    """Return whether a device, here or described, has the instruction wgmma."""
    return device.platform == "gpu" and float(device.compute_capability) == WGMMA_CAPABILITY


def requires_triton() -> tuple[bool, str]:
    """Return whether Triton compiles for the GPU, for `dispatch.unmet`."""
    is_met = compute_capability() >= TRITON_CAPABILITY
    return is_met, f"compute capability {TRITON_CAPABILITY} and later"


def requires_wgmma() -> tuple[bool, str]:
    """Return whether the GPU has the instruction wgmma, for `dispatch.unmet`."""
    is_met = compute_capability() == WGMMA_CAPABILITY
    return is_met, f"compute capability {WGMMA_CAPABILITY}"


def requires_mosaic_gpu() -> tuple[bool, str]:
    """Return whether JAX has what kernels in Mosaic GPU are written in, for `dispatch.unmet`."""
    oldest = ".".join(map(str, OLDEST_MOSAIC_JAX))
    return jax.__version_info__ >= OLDEST_MOSAIC_JAX, f"JAX {oldest} and later"
