"""Weights in 8 or 4 bits with a scale per output row and group of inputs."""

from glm_jax.quantization.array import QuantizedArray, dequantize
from glm_jax.quantization.formats import QuantizationError, WeightFormat
from glm_jax.quantization.packing import pack_int4, unpack_int4
from glm_jax.quantization.quantize import quantize
from glm_jax.quantization.scheme import Scheme

__all__ = [
    "QuantizationError",
    "QuantizedArray",
    "Scheme",
    "WeightFormat",
    "dequantize",
    "pack_int4",
    "quantize",
    "unpack_int4",
]
