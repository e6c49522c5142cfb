"""The released layout: names of SwissArmyTransformer and how each tensor was split."""

import dataclasses
import math
import os
from collections.abc import Callable
from concurrent import futures

import numpy as np

from convert.errors import ConvertError
from glm_jax.config import GLMConfig

EMBEDDING = "transformer.word_embeddings.weight"
FINAL_LAYERNORM = "transformer.final_layernorm"
_LINEARS = {
    "query_key_value": "attention.query_key_value",
    "dense": "attention.dense",
    "dense_h_to_4h": "mlp.dense_h_to_4h",
    "dense_4h_to_h": "mlp.dense_4h_to_h",
}
_ROWS = 32  # of a step of a transpose
COLUMN_PARALLEL = ("query_key_value", "dense_h_to_4h")
LAYERNORMS = ("input_layernorm", "post_attention_layernorm")


def linear_name(layer: int, name: str) -> str:
    """The released name of one of our linears, without ".weight" or ".bias"."""
    return f"transformer.layers.{layer}.{_LINEARS[name]}"


def layernorm_name(layer: int, name: str) -> str:
    return f"transformer.layers.{layer}.{name}"


@dataclasses.dataclass(frozen=True)
class MergedLinear:
    """A linear in our layout. `scales` only of a quantised one, whose kernel is packed."""

    kernel: np.ndarray
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


def merge_linear(
    config: GLMConfig,
    name: str,
    count: int,
    read: Callable[[str, int], np.ndarray],
    bits: int | None,
) -> MergedLinear:
    """Joins one linear's shards and turns [outputs, inputs] into [inputs, *outputs].

    Column-parallel weights were split by rows, of the GLU each half by itself;
    row-parallel ones by columns, so that a quantised one brings one scale per row and
    shard: those are the groups along its inputs.

    Args:
      count: shards; they are read as many at a time as there are processors.
      read: gives the "weight", "bias" or "weight_scale" of a shard.
    """
    outputs = output_shape(config, name)
    width, is_column = math.prod(outputs), name in COLUMN_PARALLEL
    inputs = config.inner_hidden_size if name == "dense_4h_to_h" else config.hidden_size
    stored = inputs if bits is None else inputs * bits // 8
    first = read("weight", 0)
    kernel = np.empty((stored, width), first.dtype)

    def place(rank: int) -> None:
        weight = first if rank == 0 else read("weight", rank)
        if not is_column:
            size = stored // count
            _transpose(weight, kernel[rank * size : (rank + 1) * size])
            return
        for to, part in _columns(name, kernel, weight, rank, count):
            _transpose(part, to)

    with futures.ThreadPoolExecutor(min(count, os.cpu_count() or 1)) as pool:
        list(pool.map(place, range(count)))

    def joined(kind: str) -> np.ndarray:
        parts = [read(kind, rank) for rank in range(count)]
        whole = np.empty((1, width), parts[0].dtype)
        for rank, part in enumerate(parts):
            for to, values in _columns(name, whole, part[:, None], rank, count):
                to[:] = values.T
        return whole

    scales = None
    if bits is not None and is_column:
        scales = joined("weight_scale")
    elif bits is not None:
        scales = np.stack([read("weight_scale", rank) for rank in range(count)])
    bias = joined("bias") if is_column else read("bias", 0)
    return MergedLinear(
        kernel=kernel.reshape(stored, *outputs),
        bias=bias.reshape(outputs),
        scales=None if scales is None else scales.reshape(len(scales), *outputs),
    )


def _columns(
    name: str, whole: np.ndarray, part: np.ndarray, rank: int, count: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Where a column-parallel shard's rows [outputs, ..] go as columns of [.., outputs]."""
    halves = 2 if name == "dense_h_to_4h" else 1
    size = whole.shape[1] // halves // count
    places = []
    for half in range(halves):
        begin = half * (whole.shape[1] // halves) + rank * size
        places.append((whole[:, begin : begin + size], part[half * size : (half + 1) * size]))
    return places


def _transpose(source: np.ndarray, to: np.ndarray) -> None:
    """to[:] = source.T, some rows at a time: at once it takes three times as long."""
    for i in range(0, len(source), _ROWS):
        to[:, i : i + _ROWS] = source[i : i + _ROWS].T


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
