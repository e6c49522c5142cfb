"""The released layout: names of SwissArmyTransformer and how each tensor was split."""

import dataclasses
from collections.abc import Callable

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
    weights: list[np.ndarray],
    biases: list[np.ndarray],
    scales: list[np.ndarray] | None,
) -> MergedLinear:
    """Joins one linear's shards and turns [outputs, inputs] into [inputs, *outputs].

    Column-parallel weights were split by rows, of the GLU each half by itself;
    row-parallel ones by columns, so that a quantised one brings one scale per row and
    shard: those are the groups along its inputs.
    """
    outputs = output_shape(config, name)
    if name in COLUMN_PARALLEL:
        join = _join_glu if name == "dense_h_to_4h" else np.concatenate
        weight, bias = join(weights), join(biases)
        joined = None if scales is None else join(scales)[None]
    else:
        weight, bias = np.concatenate(weights, axis=1), biases[0]
        joined = None if scales is None else np.stack(scales)
    return MergedLinear(
        kernel=np.ascontiguousarray(weight.T).reshape(weight.shape[1], *outputs),
        bias=bias.reshape(outputs),
        scales=None if joined is None else joined.reshape(len(joined), *outputs),
    )


def split_linear(
    name: str, kernel: np.ndarray, bias: np.ndarray, shards: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Inverse of `merge_linear` for float weights: (weight, bias) of each shard.

    Raises:
      ConvertError: the linear does not divide into that many shards.
    """
    weight, flat_bias = kernel.reshape(kernel.shape[0], -1).T, bias.reshape(-1)
    if name not in COLUMN_PARALLEL:
        _check_divides(name, weight.shape[1], shards)
        return [(part, flat_bias) for part in np.split(weight, shards, axis=1)]
    halves = 2 if name == "dense_h_to_4h" else 1
    units = bias.shape[0] if halves == 1 else bias.shape[1]
    _check_divides(name, units, shards)
    split: Callable[[np.ndarray], list[np.ndarray]] = lambda x: [
        np.concatenate(parts)
        for parts in zip(*(np.split(h, shards) for h in np.split(x, halves)), strict=True)
    ]
    return list(zip(split(weight), split(flat_bias), strict=True))


def _join_glu(parts: list[np.ndarray]) -> np.ndarray:
    halves = [np.split(part, 2) for part in parts]
    return np.concatenate([first for first, _ in halves] + [second for _, second in halves])


def _check_divides(name: str, size: int, shards: int) -> None:
    if size % shards:
        raise ConvertError(f"{name} ({size}) does not divide into {shards} shards")
