"""Weights held in 8 or 4 bits with a scale per output row and group of inputs."""

from glm_jax.quantization.array import QuantizationError, QuantizedArray, dequantize, quantize
from glm_jax.quantization.packing import pack_int4, unpack_int4

__all__ = [
    "QuantizationError",
    "QuantizedArray",
    "dequantize",
    "pack_int4",
    "quantize",
    "unpack_int4",
]
