"""Quantise a kernel during a conversion, a slice at a time to save memory."""

import functools
from typing import Any

import jax
import numpy as np

from glm_jax.model import params as glm_params
from glm_jax.quantization import QuantizedArray, Scheme, quantize

_SLICES = (32, 16, 8, 4, 2, 1)  # of a kernel's outputs


def quantized_kernel(kernel: np.ndarray, scheme: Scheme, axes: Any) -> QuantizedArray:
    """Quantise a stacked kernel [1, inputs, *outputs], some outputs at a time.

    The search for scales runs in float32, so that all outputs at once would need much memory.
    """
    outputs = kernel.shape[2:]
    flat = kernel.reshape(*kernel.shape[:2], -1)
    count = next(n for n in _SLICES if flat.shape[2] % n == 0)
    slices = [_quantize_slice(part, scheme) for part in np.split(flat, count, axis=2)]

    def joined(name: str) -> Any:
        arrays = [np.asarray(getattr(part, name)) for part in slices]
        whole = np.concatenate(arrays, axis=2)
        return whole.reshape(*whole.shape[:2], *outputs)

    return QuantizedArray(
        values=joined("values"),
        scales=joined("scales"),
        bits=scheme.bits,
        contraction_axis=glm_params.contraction_axis(kernel),
        zero_points=joined("zero_points") if scheme.zero_point else None,
        axes=axes,
    )


@functools.partial(jax.jit, static_argnames="scheme")
def _quantize_slice(part: jax.Array, scheme: Scheme) -> QuantizedArray:
    return quantize(part, scheme, -2)
