"""The released layout: names of SwissArmyTransformer and how each tensor was split."""

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
    """The released name of one of our linears, without ".weight" or ".bias"."""
    return f"transformer.layers.{layer}.{_LINEARS[name]}"


def layernorm_name(layer: int, name: str) -> str:
    return f"transformer.layers.{layer}.{name}"


@dataclasses.dataclass(frozen=True)
class MergedLinear:
    """A linear in our layout.

    Attributes:
      pieces: [pieces, inputs, *outputs], split along the tensor axis; packed if quantised.
      scales: [groups, *outputs] of a quantised one.
    """

    pieces: np.ndarray
    bias: np.ndarray
    scales: np.ndarray | None


def output_shape(config: GLMConfig, name: str) -> tuple[int, ...]:
    """Our output axes of a linear."""
    return {
        "query_key_value": (config.num_heads, 3, config.head_dim),
        "dense": (config.hidden_size,),
        "dense_h_to_4h": (2, config.inner_hidden_size),
        "dense_4h_to_h": (config.hidden_size,),
    }[name]


def shard_shapes(
    config: GLMConfig, shards: int, bits: int | None = None
) -> dict[str, tuple[int, ...]]:
    """Released name and shape of each tensor of one shard, in the original's order, but for
    the rotary frequencies, which stand in different places.

    Args:
      bits: 8 or 4 of quantised shards.
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
    """Where released shards keep the rotary frequencies."""
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
    """Joins one linear's shards and turns [outputs, inputs] into [inputs, *outputs].

    Column-parallel weights were split by rows, of the GLU each half by itself;
    row-parallel ones by columns, so that a quantised one brings one scale per row and
    shard: those are the groups along its inputs.

    Args:
      count: shards; they are read as many at a time as there are processors.
      read: gives the "weight", "bias" or "weight_scale" of a shard. A weight need not
        last longer than until the same thread reads again.
      dtype: of the weights.
      pieces: along the tensor axis, which the kernel is given in.
    """
    outputs = output_shape(config, name)
    width, is_column = math.prod(outputs), name in COLUMN_PARALLEL
    inputs = config.inner_hidden_size if name == "dense_4h_to_h" else config.hidden_size
    stored = inputs if bits is None else inputs * bits // 8
    sizes = (stored, width // pieces) if is_column else (stored // pieces, width)
    kernel = allocate((pieces, *sizes), dtype)

    def place(rank: int) -> None:
        weight = read("weight", rank)
        if is_column:
            for to, rows in _columns(name, kernel, rank, count):
                transpose(weight[rows], to)
        else:
            size = stored // count
            transpose(weight, kernel.reshape(stored, width)[rank * size : (rank + 1) * size])

    with futures.ThreadPoolExecutor(min(count, os.cpu_count() or 1)) as pool:
        list(pool.map(place, range(count)))

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
    """Where a column-parallel shard's rows go: parts [.., columns] of the pieces of a kernel
    [pieces, .., columns], and which rows they are."""
    halves = 2 if name == "dense_h_to_4h" else 1
    in_piece = kernel.shape[2] // halves
    in_shard = in_piece * len(kernel) // count
    begin = rank * in_shard
    places = []
    for half in range(halves):
        at = begin
        while at < begin + in_shard:
            piece, offset = divmod(at, in_piece)
            size = min(begin + in_shard - at, in_piece - offset)
            column, row = half * in_piece + offset, half * in_shard + at - begin
            places.append((kernel[piece][:, column : column + size], slice(row, row + size)))
            at += size
    return places


def merged_shape(name: str, shape: tuple[int, ...], count: int) -> tuple[int, ...]:
    """What the parts of a released tensor, or of GLM-10B's, make together."""
    linear, _, kind = name.rpartition(".")
    is_row = kind == "weight" and linear.endswith((_LINEARS["dense"], _LINEARS["dense_4h_to_h"]))
    is_column = linear.endswith(
        ("word_embeddings", *(_LINEARS[column] for column in COLUMN_PARALLEL))
    )
    axis = 1 if is_row else 0 if is_column else None
    return tuple(size * count if i == axis else size for i, size in enumerate(shape))


def split_kernel(name: str, kernel: np.ndarray, shards: int) -> list[np.ndarray]:
    """Each shard's weight [outputs, inputs] of a kernel [inputs, *outputs], or of scales.

    Raises:
      ConvertError: the linear does not divide into that many shards.
    """
    weight = kernel.reshape(kernel.shape[0], -1).T
    if name in COLUMN_PARALLEL:
        return _split_rows(name, weight, shards)
    _check_divides(name, weight.shape[1], shards)
    return np.split(weight, shards, axis=1)


def split_bias(name: str, bias: np.ndarray, shards: int) -> list[np.ndarray]:
    """Each shard's bias [outputs]; of a row-parallel linear each has the whole."""
    flat = bias.reshape(-1)
    return _split_rows(name, flat, shards) if name in COLUMN_PARALLEL else [flat] * shards


def _split_rows(name: str, rows: np.ndarray, shards: int) -> list[np.ndarray]:
    """Of the GLU each half by itself."""
    halves = np.split(rows, 2 if name == "dense_h_to_4h" else 1)
    _check_divides(name, len(halves[0]), shards)
    split = [np.split(half, shards) for half in halves]
    return [np.concatenate(parts) for parts in zip(*split, strict=True)]


def _check_divides(name: str, size: int, shards: int) -> None:
    if size % shards:
        raise ConvertError(f"{name} ({size}) does not divide into {shards} shards")
