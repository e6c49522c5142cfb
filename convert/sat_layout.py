"""The released layout: SwissArmyTransformer's names, and how each tensor was split over shards."""

import dataclasses
import math
import os
from collections.abc import Callable
from concurrent import futures
from typing import Any

import numpy as np

from convert.errors import ConvertError
from convert.transpose import transpose
from glm_jax.config import GLMConfig

Allocate = Callable[[tuple[int, ...], Any], np.ndarray]
EMBEDDING = "transformer.word_embeddings.weight"
SCALE = "weight_scale"
FINAL_LAYERNORM = "transformer.final_layernorm"
_LINEARS = {
    "query_key_value": "attention.query_key_value",
    "dense": "attention.dense",
    "dense_h_to_4h": "mlp.dense_h_to_4h",
    "dense_4h_to_h": "mlp.dense_4h_to_h",
}
COLUMN_PARALLEL = ("query_key_value", "dense_h_to_4h")
LAYERNORMS = ("input_layernorm", "post_attention_layernorm")


def linear_name(layer: int, name: str) -> str:
    """Return the released name of a linear, without ".weight" or ".bias"."""
    return f"transformer.layers.{layer}.{_LINEARS[name]}"


def layernorm_name(layer: int, name: str) -> str:
    return f"transformer.layers.{layer}.{name}"


@dataclasses.dataclass(frozen=True)
class MergedLinear:
    """A linear in our layout.

    Attributes:
      pieces: [pieces, inputs, *outputs], split along the tensor axis; packed if quantised.
      scales: [groups, *outputs] if quantised, else None.
    """

    pieces: np.ndarray
    bias: np.ndarray
    scales: np.ndarray | None


def output_shape(config: GLMConfig, name: str) -> tuple[int, ...]:
    """Return the sizes of a linear's output axes in our layout."""
    return {
        "query_key_value": (config.num_heads, 3, config.head_dim),
        "dense": (config.hidden_size,),
        "dense_h_to_4h": (2, config.inner_hidden_size),
        "dense_4h_to_h": (config.hidden_size,),
    }[name]


def shard_shapes(
    config: GLMConfig, shards: int, bits: int | None = None
) -> dict[str, tuple[int, ...]]:
    """Return the released name and shape of each tensor of one shard, in the original's order.

    The rotary frequencies are left out: their order differs between releases.

    Args:
      bits: 8 or 4 for quantised shards.
    """
    hidden = (config.hidden_size,)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size // shards, *hidden)}

    def add_norm(name: str) -> None:
        shapes.update({f"{name}.weight": hidden, f"{name}.bias": hidden})

    for i in range(config.num_layers):
        for name in LAYERNORMS:
            add_norm(layernorm_name(i, name))
        for name in _LINEARS:
            outputs = math.prod(output_shape(config, name))
            inputs = config.inner_hidden_size if name == "dense_4h_to_h" else config.hidden_size
            if name in COLUMN_PARALLEL:
                outputs //= shards
            else:
                inputs //= shards
            prefix = linear_name(i, name)
            shapes[f"{prefix}.weight"] = (outputs, inputs if bits is None else inputs * bits // 8)
            shapes[f"{prefix}.bias"] = (outputs,)
            if bits is not None:
                shapes[f"{prefix}.{SCALE}"] = (outputs,)
    add_norm(FINAL_LAYERNORM)
    return shapes


def frequency_names(config: GLMConfig) -> list[str]:
    """Return the released names of the rotary frequencies."""
    return [
        f"transformer.layers.{i}.attention.rotary_emb.inv_freq" for i in range(config.num_layers)
    ]


def merge_linear(
    config: GLMConfig,
    name: str,
    count: int,
    read: Callable[[str, int], np.ndarray],
    dtype: Any,
    bits: int | None = None,
    pieces: int = 1,
    allocate: Allocate = np.empty,
) -> MergedLinear:
    """Join one linear's shards and transpose [outputs, inputs] to [inputs, *outputs].

    Column-parallel weights were split by rows, each half of the GLU separately; row-parallel ones
    by columns. A quantised row-parallel weight has a scale for each row and shard: the shards are
    the groups along its inputs.

    Args:
      count: number of shards; as many are read at a time as there are processors.
      read: returns a shard's "weight", "bias" or "weight_scale", by that name and the rank. A
        weight is used only until the same thread reads again.
      dtype: of the weights.
      pieces: number of pieces along the tensor axis that the kernel is split into.
      allocate: makes the array of the kernel from its shape and dtype.
    """
    outputs = output_shape(config, name)
    width, is_column = math.prod(outputs), name in COLUMN_PARALLEL
    inputs = config.inner_hidden_size if name == "dense_4h_to_h" else config.hidden_size
    stored = inputs if bits is None else inputs * bits // 8
    sizes = (stored, width // pieces) if is_column else (stored // pieces, width)
    kernel = allocate((pieces, *sizes), dtype)

    def copy(rank: int) -> None:
        weight = read("weight", rank)
        if is_column:
            for to, rows in _columns(name, kernel, rank, count):
                transpose(weight[rows], to)
        else:
            size = stored // count
            transpose(weight, kernel.reshape(stored, width)[rank * size : (rank + 1) * size])

    with futures.ThreadPoolExecutor(min(count, os.cpu_count() or 1)) as pool:
        list(pool.map(copy, range(count)))

    def joined(kind: str) -> np.ndarray:
        parts = [read(kind, rank) for rank in range(count)]
        whole = np.empty((1, 1, width), parts[0].dtype)
        for rank, part in enumerate(parts):
            for to, rows in _columns(name, whole, rank, count):
                to[:] = part[rows]
        return whole[0]

    scales = None
    if bits is not None and is_column:
        scales = joined(SCALE)
    elif bits is not None:
        scales = np.stack([read(SCALE, rank) for rank in range(count)])
    bias = joined("bias") if is_column else read("bias", 0)
    piece = [size // pieces if i == 0 and is_column else size for i, size in enumerate(outputs)]
    if name == "dense_h_to_4h":
        piece = [2, config.inner_hidden_size // pieces]
    return MergedLinear(
        pieces=kernel.reshape(pieces, sizes[0], *piece),
        bias=bias.reshape(outputs),
        scales=None if scales is None else scales.reshape(len(scales), *outputs),
    )


def _columns(
    name: str, kernel: np.ndarray, rank: int, count: int
) -> list[tuple[np.ndarray, slice]]:
    """Return where a column-parallel shard's rows belong in a kernel.

    Args:
      kernel: [pieces, .., columns].

    Returns:
      Views [.., columns] of the kernel's pieces, each with the shard's rows to copy there.
    """
    halves = 2 if name == "dense_h_to_4h" else 1
    in_piece = kernel.shape[2] // halves
    in_shard = in_piece * len(kernel) // count
    begin = rank * in_shard
    targets = []
    for half in range(halves):
        column = begin
        while column < begin + in_shard:
            piece, offset = divmod(column, in_piece)
            size = min(begin + in_shard - column, in_piece - offset)
            first, row = half * in_piece + offset, half * in_shard + column - begin
            targets.append((kernel[piece][:, first : first + size], slice(row, row + size)))
            column += size
    return targets


def merged_shape(name: str, shape: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Return the whole shape of a released tensor, or of GLM-10B's, from a shard's."""
    linear, _, kind = name.rpartition(".")
    is_row = kind == "weight" and linear.endswith((_LINEARS["dense"], _LINEARS["dense_4h_to_h"]))
    is_column = linear.endswith(
        ("word_embeddings", *(_LINEARS[column] for column in COLUMN_PARALLEL))
    )
    axis = 1 if is_row else 0 if is_column else None
    return tuple(size * count if i == axis else size for i, size in enumerate(shape))


def split_kernel(name: str, kernel: np.ndarray, shards: int) -> list[np.ndarray]:
    """Split a kernel [inputs, *outputs], or its scales, into each shard's weight [outputs, inputs].

    Raises:
      ConvertError: the linear does not divide into that many shards.
    """
    weight = kernel.reshape(kernel.shape[0], -1).T
    if name in COLUMN_PARALLEL:
        return _split_rows(name, weight, shards)
    _check_divides(name, weight.shape[1], shards)
    return np.split(weight, shards, axis=1)


def split_bias(name: str, bias: np.ndarray, shards: int) -> list[np.ndarray]:
    """Split a bias into each shard's [outputs]; each has the whole of a row-parallel linear's."""
    flat = bias.reshape(-1)
    return _split_rows(name, flat, shards) if name in COLUMN_PARALLEL else [flat] * shards


def _split_rows(name: str, rows: np.ndarray, shards: int) -> list[np.ndarray]:
    """Split rows over shards, each half of the GLU separately."""
    halves = np.split(rows, 2 if name == "dense_h_to_4h" else 1)
    _check_divides(name, len(halves[0]), shards)
    split = [np.split(half, shards) for half in halves]
    return [np.concatenate(parts) for parts in zip(*split, strict=True)]


def _check_divides(name: str, size: int, shards: int) -> None:
    if size % shards:
        raise ConvertError(f"{name} ({size}) does not divide into {shards} shards")
