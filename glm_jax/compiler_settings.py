"""The settings of XLA that differ from its defaults, all of them for GPUs.

docs/training.md and docs/decoding.md say what each does, and who recommends it. A setting that
the environment's XLA_FLAGS names stays as it is there.
"""

import os
from typing import TypeVar

_Value = TypeVar("_Value")

# Of every program of a process.
_PROCESS = {"xla_gpu_enable_latency_hiding_scheduler": True}
# Of a step that trains; its products are large, and a library's are then faster than Triton's.
_TRAINING = {"xla_gpu_enable_triton_gemm": False}
# Of such a step on several devices: two layers are a turn of the loop over them, so that the
# weights of one are gathered while the other computes.
_OVERLAPPING = {"xla_gpu_enable_while_loop_double_buffering": True}
# Of a decode step, which of its commands CUDA graphs may have: those that XLA lets them have by
# default, loops (of top-k and top-p; a conditional around one is else left out, and the host waits
# in the middle of the step to know its branch), and what devices exchange. It is one graph then.
_GRAPHS = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,"
    "DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE,COLLECTIVES"
}


def process_flags(given: str) -> str:
    """Return XLA_FLAGS for a process.

    Args:
      given: the environment's.
    """
    added = [f"--{k}={str(v).lower()}" for k, v in _PROCESS.items() if f"--{k}" not in given]
    return " ".join([given, *added]).strip()


def of_training(platform: str, num_devices: int) -> dict[str, bool]:
    """Return `compiler_options` of `jax.jit` for a train step.

    Args:
      platform: of its devices, as JAX names it.
    """
    if platform not in ("gpu", "cuda"):
        return {}
    return _not_given(_TRAINING | (_OVERLAPPING if num_devices > 1 else {}))


def of_decoding() -> dict[str, str]:
    """Return `compiler_options` of `jax.jit` for a decode step; they mean nothing but on a GPU."""
    return _not_given(_GRAPHS)


def _not_given(settings: dict[str, _Value]) -> dict[str, _Value]:
    given = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in settings.items() if f"--{name}" not in given}
