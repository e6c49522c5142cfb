"""Products with quantised weights on CPU: a C++ kernel that XLA calls (`jax.ffi`).

XLA on CPU writes the whole weight matrix out as floats before each product. The kernel
unpacks weights in registers instead, so that a step reads an eighth of the bytes. Weights
are laid out anew for it once, when a model is made ready to decode: strips of 16 outputs,
each one run of bytes in the order in which it is read.
"""

import ctypes
import functools
import math
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Float32, Int8

from glm_jax.quantization import QuantizedArray, unpack_int4

LIBRARY = "libglm_jax_cpu.so"
_STRIP = 16
_TARGET = "glm_jax_quantized_matmul"
_WIDEST = 512


@struct.dataclass
class TiledArray:
    """A quantised weight [K, *outputs] in the kernel's layout.

    Attributes:
      values: int8 [strips, K * bits / 32, 64]: 16 lanes of 32 bits, one an output; a lane
        holds 32 / bits neighbouring inputs, the first in the lowest bits.
      scales: float32 [groups, 16 * strips].
      bits: 8 or 4.
      shape: [K, *outputs].
    """

    values: Int8[Array, "strips words 64"]
    scales: Float32[Array, "groups outputs"]
    bits: int = struct.field(pytree_node=False)
    shape: tuple[int, ...] = struct.field(pytree_node=False)


@functools.cache
def is_available() -> bool:
    """Whether the kernel was built; says so once, by a warning, where it was not."""
    path = Path(__file__).with_name(LIBRARY)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        warnings.warn(
            f"the CPU kernel is not built ({error}): low precision will be slow here; "
            "install the package where a C++ compiler is",
            stacklevel=2,
        )
        return False
    handler = jax.ffi.pycapsule(library.GlmJaxQuantizedMatmul)
    jax.ffi.register_ffi_target(_TARGET, handler, platform="cpu")
    return True


def can_tile(weight: QuantizedArray) -> bool:
    """Whether the kernel takes a weight: symmetric, a group filling whole 32-bit words."""
    inputs = weight.shape[weight.contraction_axis]
    is_whole = inputs % (weight.groups * 32 // weight.bits) == 0
    return is_whole and weight.zero_points is None and is_available()


@jax.jit
def tile(weight: QuantizedArray) -> TiledArray:
    """Lays a weight [K, *outputs] out for the kernel."""
    inputs, outputs = weight.shape[0], math.prod(weight.shape[1:])
    padding = -outputs % _STRIP
    values = weight.values
    if weight.bits == 4:
        values = unpack_int4(values, 0)
    matrix = jnp.pad(values.reshape(inputs, outputs), ((0, 0), (0, padding)))
    per_word = 32 // weight.bits
    words = matrix.reshape(inputs // per_word, per_word, -1, _STRIP)
    lanes = words.transpose(2, 0, 3, 1)  # strip, word, lane, input
    if weight.bits == 4:
        # Two inputs a byte, the first in the low half.
        lanes = (lanes[..., 0::2] & 0x0F) | (lanes[..., 1::2] << 4)
    scales = weight.scales.reshape(weight.groups, outputs).astype(jnp.float32)
    return TiledArray(
        values=lanes.reshape(*lanes.shape[:2], 4 * _STRIP),
        scales=jnp.pad(scales, ((0, 0), (0, padding))),
        bits=weight.bits,
        shape=weight.shape,
    )


def matmul(x: Float[Array, "..."], weight: TiledArray, widest: int = _WIDEST) -> Array:
    """x [..., K] times weight [K, *outputs], in float32 throughout.

    Args:
      widest: bits of the widest vectors to use (512, 256 or less), for tests.

    Returns:
      float32 [..., *outputs].

    Raises:
      RuntimeError: the kernel is not built.
    """
    if not is_available():
        raise RuntimeError("a weight in the CPU kernel's layout, and no CPU kernel")
    inputs, *outputs = weight.shape
    rows = x.reshape(-1, inputs).astype(jnp.float32)
    result = jax.ShapeDtypeStruct((rows.shape[0], math.prod(outputs)), jnp.float32)
    call = jax.ffi.ffi_call(_TARGET, result)
    product: Array = call(
        rows, weight.values, weight.scales, bits=np.int64(weight.bits), widest=np.int64(widest)
    )
    return product.reshape(*x.shape[:-1], *outputs)
