"""The settings of XLA that differ from its defaults, all of them for GPUs.

docs/training.md and docs/decoding.md say what each does, and who recommends it. A setting that
the environment's XLA_FLAGS names stays as it is there.
"""

import os
from typing import Any

# Of every program of a process.
_PROCESS = {"xla_gpu_enable_latency_hiding_scheduler": True}
# Of a step that trains; its products are large, and a library's are then faster than Triton's.
_TRAINING = {"xla_gpu_enable_triton_gemm": False}
# Where weights or gradients are exchanged, independent collectives of one kind become one, up to
# these bytes: large ones use more of a link's bandwidth.
_COMBINED = "xla_gpu_{}_combine_threshold_bytes"
_LEAST_COMBINED = 30 * 2**20  # XLA's own
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
    added = [f"--{k}={str(v).lower()}" for k, v in _PROCESS.items() if k not in _names(given)]
    return " ".join([given, *added]).strip()


def of_training(platform: str, exchanged: int = 0) -> dict[str, Any]:
    """Return `compiler_options` of `jax.jit` for a train step.

    Args:
      platform: of its devices, as JAX names it.
      exchanged: numbers of a layer's weights that a device gathers, 0 where each device has all
        that it needs.
    """
    if platform not in ("gpu", "cuda"):
        return {}
    settings: dict[str, Any] = dict(_TRAINING)
    if exchanged:
        # Weights in two bytes, gradients in float32.
        sizes = {"all_gather": 2, "reduce_scatter": 4, "all_reduce": 4}
        settings |= {
            _COMBINED.format(kind): max(_LEAST_COMBINED, size * exchanged)
            for kind, size in sizes.items()
        }
    return _not_given(settings)


def of_decoding() -> dict[str, Any]:
    """Return `compiler_options` of `jax.jit` for a decode step; they mean nothing but on a GPU."""
    return _not_given(_GRAPHS)


def _not_given(settings: dict[str, Any]) -> dict[str, Any]:
    given = _names(os.environ.get("XLA_FLAGS", ""))
    return {name: value for name, value in settings.items() if name not in given}


def _names(flags: str) -> set[str]:
    """Return the names of the flags in XLA_FLAGS."""
    return {flag.split("=")[0].removeprefix("--") for flag in flags.split()}
