"""Products with weights on CPU: a C++ kernel that XLA calls (`jax.ffi`).

XLA on CPU writes a whole quantised matrix out as floats before each product. The kernel
unpacks weights in registers instead, so that a step reads an eighth of the bytes. Weights
are laid out for it once, before decoding: strips of 16 outputs, each contiguous in the order in
which it is read.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from glm_jax.kernels import cpu_library
from glm_jax.kernels.dispatch import unmet
from glm_jax.kernels.quantized_matmul.arguments import INTEGERS, Arguments, add_bias
from glm_jax.numerics import einsum
from glm_jax.quantization import QuantizedArray, unpack_int4

LIBRARY = "libglm_jax_cpu"
_STRIP = 16
_STEP = 8  # inputs that the kernel takes at once
_TARGET = "glm_jax_quantized_matmul"
_FLOAT_BITS = {"float32": 32, "bfloat16": 16}


@struct.dataclass
class TiledArray:
    """A weight [K, *outputs] in the kernel's layout.

    Attributes:
      values: int8 [strips, K * bits / 32, 64]: 16 lanes of 32 bits, one an output; a lane
        holds 32 / bits neighbouring inputs, the first in the lowest bits. Integers are
        stored without a sign, 2^(bits - 1) above what they are.
      scales: float32 [groups, 16 * strips]; ones for a float weight.
      bits: 4, 8, 16 (bfloat16) or 32 (float32).
      shape: [K, *outputs].
      zero_points: float32, of the scales' shape; None where the weight is symmetric.
      activation_bits: 8 to round activations to 8 bits, a scale for each 64 inputs, and
        multiply integers; None to multiply float32.
    """

    values: Any  # or what jax puts in its place while it transforms a function
    scales: Any
    bits: int = struct.field(pytree_node=False)
    shape: tuple[int, ...] = struct.field(pytree_node=False)
    zero_points: Any = None
    activation_bits: int | None = struct.field(pytree_node=False, default=None)

    layout = "cpu"
    axes = None  # the layout is of one device

    @property
    def contraction_axis(self) -> int:
        return -len(self.shape)

    def flattened(self) -> "TiledArray":
        """Return the same weight as [K, N]."""
        return dataclasses.replace(self, shape=(self.shape[0], math.prod(self.shape[1:])))


def is_available() -> bool:
    """Whether the kernel was built; warns once where not."""
    return cpu_library.register(Path(__file__).with_name(LIBRARY), _TARGET)


@dataclasses.dataclass(frozen=True)
class CPUKernel:
    """A weight in the kernel's layout."""

    name: str = "cpu"
    platform: None = None  # no other backend takes the layout

    def supports(self, arguments: Arguments) -> str | None:
        return unmet((arguments.weight.layout == "cpu", "a weight in its own layout"))

    def __call__(self, arguments: Arguments) -> Array:
        return add_bias(matmul(arguments.x, arguments.weight), arguments.bias)


class CPUTransposed(CPUKernel):
    """The product with the transpose."""

    def __call__(self, arguments: Arguments) -> Array:
        return transposed_matmul(arguments.x, arguments.weight)


def can_tile(weight: Any) -> bool:
    """Whether the kernel takes a weight: whole steps of inputs, in each group."""
    if isinstance(weight, QuantizedArray):
        inputs, groups = weight.shape[weight.contraction_axis], weight.groups
        if weight.stored_dtype not in INTEGERS:
            return False
    else:
        inputs, groups = weight.shape[0], 1
        if str(weight.dtype) not in _FLOAT_BITS:
            return False
    return inputs % (groups * _STEP) == 0 and is_available()


@functools.partial(jax.jit, static_argnames="activation_bits")
def tile(weight: QuantizedArray | Array, activation_bits: int | None = None) -> TiledArray:
    """Lays a weight [K, *outputs], quantised, float32 or bfloat16, out for the kernel.

    Args:
      activation_bits: 8 for integer products; a float weight has none and ignores it.
    """
    inputs, outputs = weight.shape[0], math.prod(weight.shape[1:])
    matrix = lambda a: jnp.pad(a.reshape(-1, outputs), ((0, 0), (0, -outputs % _STRIP)))
    zeros = None
    if isinstance(weight, QuantizedArray):
        bits, values, zeros = weight.bits, weight.values, weight.zero_points
        values = (unpack_int4(values, 0) if bits == 4 else values) ^ jnp.int8(-(2 ** (bits - 1)))
        scales = matrix(weight.scales).astype(jnp.float32)
    else:
        bits, values = _FLOAT_BITS[str(weight.dtype)], weight
        scales, activation_bits = jnp.ones((1, outputs + -outputs % _STRIP)), None
    words = matrix(values).reshape(inputs * bits // 32, 32 // bits, -1, _STRIP)
    lanes = words.transpose(2, 0, 3, 1)  # strip, word, lane, input
    if bits == 4:
        # Two inputs a byte, the first in the low half.
        lanes = (lanes[..., 0::2] & 0x0F) | (lanes[..., 1::2] << 4)
    elif bits > 8:
        lanes = jax.lax.bitcast_convert_type(lanes, jnp.int8)
    return TiledArray(
        values=lanes.reshape(*lanes.shape[:2], 4 * _STRIP),
        scales=scales,
        bits=bits,
        shape=weight.shape,
        zero_points=None if zeros is None else matrix(zeros).astype(jnp.float32),
        activation_bits=activation_bits,
    )


def matmul(
    x: Float[Array, "..."], weight: TiledArray, max_vector_bits: int = cpu_library.MAX_VECTOR_BITS
) -> Array:
    """x [..., K] times weight [K, *outputs], accumulated in float32.

    Args:
      max_vector_bits: of vectors to use (512, 256 or less), for tests.

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
    zeros = weight.zero_points
    product: Array = jax.ffi.ffi_call(_TARGET, result)(
        rows,
        weight.values,
        weight.scales,
        jnp.zeros((0, weight.scales.shape[1])) if zeros is None else zeros,
        bits=np.int64(weight.bits),
        activation_bits=np.int64(weight.activation_bits or 32),
        max_vector_bits=np.int64(max_vector_bits),
    )
    return product.reshape(*x.shape[:-1], *outputs)


def transposed_matmul(
    gradient: Float[Array, "rows outputs"], weight: TiledArray
) -> Float[Array, "rows inputs"]:
    """gradient [rows, N] times the transpose of weight [K, *outputs], strip by strip.

    Returns:
      [rows, K] in the gradient's dtype, to which weights are rounded too; sums are float32.
    """
    strips = len(weight.values)
    padded = jnp.pad(gradient, ((0, 0), (0, strips * _STRIP - gradient.shape[1])))
    columns = padded.reshape(-1, strips, _STRIP).swapaxes(0, 1)

    def step(total: Array, strip: tuple[Array, Array]) -> tuple[Array, None]:
        part, index = strip
        outputs = index * _STRIP + jnp.arange(_STRIP)
        weights = take_outputs(weight, outputs).astype(gradient.dtype)
        return total + einsum("ro,oi->ri", part, weights), None

    start = jnp.zeros((len(gradient), weight.shape[0]), jnp.float32)
    total: Array = jax.lax.scan(step, start, (columns, jnp.arange(strips)))[0]
    return total.astype(gradient.dtype)


def take_outputs(
    weight: TiledArray, outputs: Int[Array, "*indices"]
) -> Float[Array, "*indices inputs"]:
    """Return the weights of some outputs, as floats: float32, or bfloat16 where stored so.

    Args:
      outputs: indices into [0, 16 * strips), outputs flattened.

    Returns:
      [*indices, K].
    """
    inputs, bits = weight.shape[0], weight.bits
    lanes = weight.values.reshape(*weight.values.shape[:2], _STRIP, 4)
    words = lanes[outputs // _STRIP, :, outputs % _STRIP]
    if bits > 8:
        dtype = jnp.float32 if bits == 32 else jnp.bfloat16
        pairs = words.reshape(*outputs.shape, inputs, bits // 8)
        return jax.lax.bitcast_convert_type(pairs, dtype)
    if bits == 4:
        words = jnp.stack([words & 0x0F, (words >> 4) & 0x0F], axis=-1) - 8
    else:
        words = words ^ jnp.int8(-128)
    groups = weight.scales.shape[0]
    values = words.reshape(*outputs.shape, groups, inputs // groups).astype(jnp.float32)
    of_groups = lambda a: jnp.moveaxis(a[:, outputs], 0, -1)[..., None]
    if weight.zero_points is not None:
        values = values - of_groups(weight.zero_points)
    return (values * of_groups(weight.scales)).reshape(*outputs.shape, inputs)
