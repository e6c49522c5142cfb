"""What device a program is compiled for."""

import jax
from jax.extend import backend

TRITON_CAPABILITY = 8.0  # the least that Triton compiles for

# Of GPUs that are compiled for without being here, under XLA's names for them; a GPU that
# is here says its own.
_CAPABILITIES = {
    "V100": 7.0,
    "2080": 7.5,
    "T4": 7.5,
    "A100": 8.0,
    "3090": 8.6,
    "H100": 9.0,
    "H200": 9.0,
}


def platform() -> str:
    """Return the platform of the surrounding mesh's devices, else of the default device.

    Returns:
      JAX's name for lowering: "cpu", "cuda", "tpu".
    """
    described = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    name = (described or backend.get_default_device()).platform
    return "cuda" if name == "gpu" else name


def compute_capability() -> float:
    """Compute capability of the surrounding mesh's GPUs, else of this process's.

    Returns:
      Such as 8.6; 0 where there is no GPU or nothing is known of it.
    """
    described = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    devices = [device for device in jax.devices() if device.platform == "gpu"]
    if described is not None:
        devices = [device for device in devices if device.device_kind == described.device_kind]
    if devices:
        return float(devices[0].compute_capability)
    kind = "" if described is None else described.device_kind
    return next((value for name, value in _CAPABILITIES.items() if name in kind), 0.0)
