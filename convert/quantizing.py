"""A kernel of a conversion in few bits, with the memory of a slice of it."""

import functools
from typing import Any

import jax
import numpy as np

from glm_jax.model import params as glm_params
from glm_jax.quantization import QuantizedArray, Scheme, quantize

_SLICES = (32, 16, 8, 4, 2, 1)  # of a kernel's outputs


def quantized_kernel(kernel: np.ndarray, scheme: Scheme, axes: Any) -> QuantizedArray:
    """A stacked kernel [1, inputs, *outputs] in few bits, some outputs at a time: what is
    searched for is searched for in float32."""
    outputs = kernel.shape[2:]
    flat = kernel.reshape(*kernel.shape[:2], -1)
    count = next(n for n in _SLICES if flat.shape[2] % n == 0)
    found = [_quantize_slice(part, scheme) for part in np.split(flat, count, axis=2)]

    def joined(name: str) -> Any:
        arrays = [np.asarray(getattr(part, name)) for part in found]
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
