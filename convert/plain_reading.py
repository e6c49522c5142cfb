"""A second reader of released tensors, for `convert.verify`, without the converter's code.

It reads with the standard library's zip reader, and joins and transposes by numpy views. Only the
list of tensors is the converter's, so that an error of the converter shows as a difference.
"""

import io
import math
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from convert.byte_source import Stream
from convert.errors import ConvertError
from convert.sat_reader import SatCheckpoint
from glm_jax.config import GLMConfig
from glm_jax.model.params import LayerNormParams, LayerParams, LinearParams
from glm_jax.quantization import QuantizedArray

# How tensors were split over shards: the axis, and the number of parts of it that were each split.
_CUTS = {
    "word_embeddings.weight": (0, 1),
    "query_key_value.weight": (0, 1),
    "query_key_value.bias": (0, 1),
    "query_key_value.weight_scale": (0, 1),
    "dense_h_to_4h.weight": (0, 2),
    "dense_h_to_4h.bias": (0, 2),
    "dense_h_to_4h.weight_scale": (0, 2),
    "dense.weight": (1, 1),
    "dense_4h_to_h.weight": (1, 1),
}
_BLOCKS = {
    "query_key_value": "attention",
    "dense": "attention",
    "dense_h_to_4h": "mlp",
    "dense_4h_to_h": "mlp",
}


class WholeTensors:
    """Released tensors by name, joined from all shards."""

    def __init__(self, checkpoint: SatCheckpoint):
        self._checkpoint = checkpoint
        self._archives = [
            zipfile.ZipFile(io.BufferedReader(Stream(shard.source))) for shard in checkpoint.shards
        ]

    def __call__(self, name: str) -> np.ndarray:
        axis, halves = _CUTS.get(".".join(name.split(".")[-2:]), (0, 0))
        count = len(self._archives)
        first = self._part(name, 0)
        if halves == 0 or count == 1:
            return first
        shape = list(first.shape)
        size = shape[axis] // halves
        cut = [*shape[:axis], halves, count, size, *shape[axis + 1 :]]
        whole = np.empty(cut, first.dtype)
        index: tuple[Any, ...] = (slice(None),) * (axis + 1)
        for rank in range(count):
            part = first if rank == 0 else self._part(name, rank)
            whole[(*index, rank)] = part.reshape([*shape[:axis], halves, size, *shape[axis + 1 :]])
        shape[axis] *= count
        return whole.reshape(shape)

    def of_each_shard(self, name: str) -> np.ndarray:
        """Return [shards, *shape] of a tensor of which each shard has its own."""
        return np.stack([self._part(name, rank) for rank in range(len(self._archives))])

    def _part(self, name: str, rank: int) -> np.ndarray:
        tensor, shard = self._checkpoint.tensor(name, rank), self._checkpoint.shards[rank]
        item = tensor.dtype.itemsize
        length = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True)) + 1
        try:
            with self._archives[rank].open(f"{shard.saved_as}/data/{tensor.storage.key}") as file:
                if tensor.offset:
                    file.seek(tensor.offset * item)
                data = file.read(length * item)
                file.read(1)  # at the end the checksum is compared
        except (zipfile.BadZipFile, KeyError) as error:
            raise ConvertError(f"{shard.name}: {name} is damaged ({error})") from error
        strides = [step * item for step in tensor.strides]
        return np.ndarray(tensor.shape, tensor.dtype, data, 0, strides)


class PlainModel:
    """An `OpenModel` of released tensors, whose arrays are views of them."""

    def __init__(
        self,
        kind: str,
        config: GLMConfig,
        bits: int | None,
        read: Callable[[str], np.ndarray],
        read_of_each: Callable[[str], np.ndarray] | None = None,
    ):
        """Args:
        read: returns a whole released tensor by name.
        read_of_each: returns a row-parallel linear's scales [shards, outputs] by name.
        """
        self.kind, self.config, self.bits = kind, config, bits
        self._read, self._read_of_each = read, read_of_each

    def embedding(self) -> np.ndarray:
        return self._read("transformer.word_embeddings.weight")

    def final_layernorm(self) -> LayerNormParams:
        return self._norm("transformer.final_layernorm")

    def layers(self) -> Iterator[LayerParams]:
        for i in range(self.config.num_layers):
            prefix = f"transformer.layers.{i}"
            norms: dict[str, Any] = {
                name: self._norm(f"{prefix}.{name}")
                for name in ("input_layernorm", "post_attention_layernorm")
            }
            linears: dict[str, Any] = {
                name: self._linear(f"{prefix}.{block}.{name}", name)
                for name, block in _BLOCKS.items()
            }
            yield LayerParams(**norms, **linears)

    def _norm(self, name: str) -> LayerNormParams:
        return LayerNormParams(self._read(f"{name}.weight"), self._read(f"{name}.bias"))

    def _linear(self, prefix: str, name: str) -> LinearParams:
        config = self.config
        outputs = {
            "query_key_value": (config.num_heads, 3, config.hidden_size // config.num_heads),
            "dense_h_to_4h": (2, config.inner_hidden_size),
        }.get(name, (config.hidden_size,))
        weight = self._read(f"{prefix}.weight")
        bias = self._read(f"{prefix}.bias").reshape(outputs)
        if weight.shape[0] != math.prod(outputs):
            raise ConvertError(f"{prefix}.weight is {weight.shape}, its config says {outputs}")
        kernel: Any = np.moveaxis(weight.reshape(*outputs, -1), -1, 0)
        if self.bits is not None:
            of_each = self._read_of_each
            is_row_parallel = name in ("dense", "dense_4h_to_h")
            if is_row_parallel and of_each is not None:
                scales = of_each(f"{prefix}.weight_scale")
            else:
                scales = self._read(f"{prefix}.weight_scale")
            kernel = QuantizedArray(
                values=kernel,
                scales=scales.reshape(-1, *outputs),
                bits=self.bits,
                contraction_axis=-kernel.ndim,
            )
        return LinearParams(kernel, bias)
