"""What device a computation is traced for."""

import jax

# Compute capabilities of GPUs that are compiled for without being here; a GPU that is here
# says its own.
_CAPABILITIES = {"V100": 7.0, "2080": 7.5, "T4": 7.5, "A100": 8.0, "3090": 8.6, "H100": 9.0}
_TRITON_NEEDS = 8.0


def gpu_compute_capability() -> float | None:
    """Compute capability of the surrounding mesh's GPUs, else of this process's.

    Returns:
      Such as 8.6; None where there is no GPU or it is not known.
    """
    described = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    devices = [d for d in jax.devices() if d.platform == "gpu"]
    if described is not None:
        devices = [d for d in devices if d.device_kind == described.device_kind]
    if devices:
        return float(devices[0].compute_capability)
    kind = "" if described is None else described.device_kind
    return next((value for name, value in _CAPABILITIES.items() if name in kind), None)


def takes_triton() -> bool:
    """Whether Triton kernels compile for the GPU: from compute capability 8.0 on."""
    capability = gpu_compute_capability()
    return capability is None or capability >= _TRITON_NEEDS
