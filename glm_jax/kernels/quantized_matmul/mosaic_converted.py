"""Products of a weight in the layout for compute capability 9.0, converted to floats tile by tile.

A tile is converted into a buffer that is small enough to stay in a GPU's second cache, where the
library's float product reads it; the next tile is written over it. For the product with the
transpose, for many rows where this is faster than the kernel, and wherever the kernel does not
run. No whole matrix of floats ever exists.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from glm_jax.kernels.quantized_matmul.arguments import Problem
from glm_jax.kernels.quantized_matmul.mosaic_blocks import ConvertedTiles, converted_tiles
from glm_jax.kernels.quantized_matmul.mosaic_layout import TILE, MosaicArray, integers
from glm_jax.numerics import dot_general
from glm_jax.quantization import QuantizedArray, dequantize

# (weight, first input, first output, tiles, dtype) to a tile [outputs, inputs] of the weight.
Convert = Callable[[MosaicArray, Array, Array, ConvertedTiles, Any], Array]


def matmul(
    x: Float[Array, "rows inputs"],
    weight: MosaicArray,
    tiles: ConvertedTiles | None = None,
    convert: Convert | None = None,
) -> Float[Array, "rows outputs"]:
    """x [rows, K] times weight [K, N], accumulated in float32; weights are rounded to x's dtype.

    Args:
      tiles: sizes that divide the weight's; by default those of `converted_tiles`.
      convert: converts a tile; by default `convert_by_xla`.

    Returns:
      float32 [rows, N].
    """
    tiles = tiles or converted_tiles(Problem.of(x, weight))

    def one(part: Array, inputs: Array, outputs: Array) -> Array:
        tile = (convert or convert_by_xla)(weight, inputs, outputs, tiles, x.dtype)
        return dot_general(part, tile, (((1,), (1,)), ((), ())), jnp.float32)

    sizes = (tiles.inputs, tiles.outputs)
    return _over_tiles(x, weight.shape[1], sizes, jnp.float32, one)


def transposed_matmul(
    y: Float[Array, "rows outputs"],
    weight: MosaicArray,
    tiles: ConvertedTiles | None = None,
    convert: Convert | None = None,
) -> Float[Array, "rows inputs"]:
    """y [rows, N] times the transpose of weight [K, N].

    Args:
      tiles, convert: see `matmul`.

    Returns:
      [rows, K] in y's dtype, to which weights are rounded too; sums are float32.
    """
    tiles = tiles or converted_tiles(Problem.of(y, weight, transposed=True))

    def one(part: Array, outputs: Array, inputs: Array) -> Array:
        tile = (convert or convert_by_xla)(weight, inputs, outputs, tiles, y.dtype)
        return dot_general(part, tile, (((1,), (0,)), ((), ())), jnp.float32)

    sizes = (tiles.outputs, tiles.inputs)
    return _over_tiles(y, weight.shape[0], sizes, y.dtype, one)


def _over_tiles(
    x: Array,
    results: int,
    sizes: tuple[int, int],
    dtype: Any,
    multiply: Callable[[Array, Array, Array], Array],
) -> Array:
    """Return the product [rows, results] of x, tile after tile, in one buffer.

    Args:
      sizes: depth and width of a tile: columns of x, and of the result.
      multiply: (columns of x, first column of x, first of the result) to their part of the sum.
    """
    depth, width = sizes
    rows, columns = x.shape

    def add(result: Array, index: Array, total: Array) -> Array:
        part = lax.dynamic_slice_in_dim(x, index * depth, depth, 1)
        return total + multiply(part, index * depth, result)

    def one(index: Array, product: Array) -> Array:
        add_part = functools.partial(add, index * width)
        total = lax.fori_loop(0, columns // depth, add_part, jnp.zeros((rows, width), jnp.float32))
        return lax.dynamic_update_slice_in_dim(product, total.astype(dtype), index * width, 1)

    product: Array = lax.fori_loop(0, results // width, one, jnp.zeros((rows, results), dtype))
    return product


def convert_by_xla(
    weight: MosaicArray, inputs: Array, outputs: Array, tiles: ConvertedTiles, dtype: Any
) -> Float[Array, "tile_outputs tile_inputs"]:
    """Return a tile of a weight [K, N] in floats, turned, on any device.

    Args:
      inputs, outputs: the first of the tile's.
    """
    starts = (outputs // TILE, inputs // TILE)
    sizes = (tiles.outputs // TILE, tiles.inputs // TILE)
    values = lax.dynamic_slice(weight.values, (*starts, 0, 0), (*sizes, *weight.values.shape[2:]))
    groups = max(1, tiles.inputs // weight.group_size)

    def of_tile(a: Array) -> Array:
        start = (inputs // weight.group_size, outputs)
        return lax.dynamic_slice(a, start, (groups, tiles.outputs))

    part = MosaicArray(values, of_tile(weight.scales), weight.bits)
    zeros = weight.zero_points
    as_bytes = QuantizedArray(
        values=integers(part),
        scales=part.scales,
        bits=8,
        contraction_axis=-2,
        zero_points=None if zeros is None else of_tile(zeros).astype(jnp.int8),
    )
    return dequantize(as_bytes, dtype).T
