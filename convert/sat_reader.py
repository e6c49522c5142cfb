"""Read the shards of a released checkpoint as one model, tensor by tensor."""

import math
import os
import re
import threading
from collections.abc import Callable
from concurrent import futures
from typing import Any

import numpy as np
from etils import epath

from convert import sat_layout
from convert.errors import ConvertError
from convert.numbers import cast, count_non_finite, differing
from convert.sat_layout import Allocate
from convert.sat_source import find_shards
from convert.torch_file import LazyTensor, TorchFile
from convert.torch_pickle import Foreign
from glm_jax.config import RELEASED_VOCAB_SIZE, GLMConfig, SpecialTokens
from glm_jax.model import params as glm_params
from glm_jax.model.params import LayerNormParams, LayerParams, LinearParams
from glm_jax.quantization import QuantizedArray

_LAYER = re.compile(r"transformer\.layers\.([0-9]{1,9})\.")
_RANK = re.compile(r"mp_rank_([0-9]{2,9})_model_states")
_FREQUENCIES = "rotary_emb.inv_freq"
# Counters of a training run: shards of one iteration agree in them.
_COUNTERS = ("iteration", "global_steps", "global_samples")
_LEARNED_POSITIONS = "block_position_embeddings.weight"


class SatCheckpoint:
    """All shards of a released checkpoint, opened but not read.

    Attributes:
      shards: the files, by rank.
      non_finite: by tensor, how many of the numbers read so far are NaN or infinite.
      differing_copies: descriptions of what differs, by name of a tensor that each shard has whole
        and whose copies are not equal; the first shard's is read.
    """

    def __init__(
        self,
        source: epath.PathLike,
        is_checked: bool = True,
        double_dtype: str | None = None,
        allow_differing_copies: bool = False,
    ):
        """Args:
        source: see `find_shards`.
        is_checked: compare what is read with the files' checksums.
        double_dtype: float64 is read as this dtype, float32 by default: no model here has it.
        allow_differing_copies: `check` accepts shards whose copies of a tensor differ.

        Raises:
          ConvertError: a shard cannot be read, or shards do not belong together.
        """
        self._allow_differing_copies = allow_differing_copies
        self._double_dtype = np.dtype(double_dtype or np.float32)
        self.shards = [TorchFile(file, is_checked) for file in find_shards(source)]
        self.non_finite: dict[str, int] = {}
        self.differing_copies: dict[str, str] = {}
        self._lock, self._thread = threading.Lock(), threading.local()
        self._modules = [module(shard) for shard in self.shards]
        self._check_equal_structure()
        self._check_ranks()
        self._frequencies = _pop_frequencies(self._modules)
        if not self.has_learned_positions:
            self._check_count()

    @property
    def names(self) -> list[str]:
        return list(self._modules[0])

    @property
    def has_learned_positions(self) -> bool:
        """Whether it is a GLM-10B, GLM-2B or GLM-large, which preceded GLM-130B."""
        return any(name.endswith(_LEARNED_POSITIONS) for name in self._modules[0])

    def _check_equal_structure(self) -> None:
        first = self._modules[0]
        for shard, module in zip(self.shards, self._modules, strict=True):
            for name in sorted(set(first) ^ set(module)):
                raise ConvertError(
                    f"{shard.name} and {self.shards[0].name} differ: only one has {name}"
                )
            for name, tensor in module.items():
                if tensor.shape != first[name].shape or tensor.dtype != first[name].dtype:
                    raise ConvertError(
                        f"{shard.name}: {name} is {tensor.dtype} {tensor.shape}, in "
                        f"{self.shards[0].name} it is {first[name].dtype} {first[name].shape}"
                    )
            for counter in _COUNTERS:
                values = (self.shards[0].content.get(counter), shard.content.get(counter))
                if all(isinstance(value, int) for value in values) and values[0] != values[1]:
                    raise ConvertError(
                        f"{shard.name} is of {counter} {values[1]}, {self.shards[0].name} of "
                        f"{values[0]}: give shards of one iteration"
                    )

    def _check_ranks(self) -> None:
        """Refuse a shard under another's name: an archive contains the name it was saved as."""
        for rank, shard in enumerate(self.shards):
            match = _RANK.fullmatch(shard.saved_as)
            if match and int(match[1]) != rank:
                raise ConvertError(
                    f"{shard.name} is the shard {shard.saved_as}.pt under another name: fetch "
                    f"mp_rank_{rank:02d}_model_states.pt again"
                )

    def _refuse_duplicates(self) -> None:
        """Refuse shards that are copies of each other, whatever their names."""
        first = self._modules[0]
        split = [
            name
            for name, tensor in first.items()
            if sat_layout.merged_shape(name, tensor.shape, 2) != tensor.shape
            and len(tensor.shape) == 2
        ]
        if not split:
            return
        seen: dict[Any, str] = {}
        for shard, tensors in zip(self.shards, self._modules, strict=True):
            found = tuple(tensors[name].stored_checksum for name in split)
            if found in seen:
                raise ConvertError(
                    f"{shard.name} and {seen[found]} hold the same weights: one shard is there "
                    "twice and another is missing; fetch both again"
                )
            seen[found] = shard.name

    def _check_count(self) -> None:
        """Raise ConvertError unless the number of shards follows from a shard's shapes."""
        hidden, rows = self._hidden_and_rows()
        count = len(self.shards)
        if rows and 3 * hidden % rows == 0 and 3 * hidden // rows != count:
            expected = 3 * hidden // rows
            name = f"mp_rank_{count:02d}_model_states.pt"
            missing = f": {name} is missing" if count < expected else ""
            raise ConvertError(
                f"{self.shards[0].name} is one of {expected} shards by its shapes, there are "
                f"{count}{missing}"
            )

    def _hidden_and_rows(self) -> tuple[int, int]:
        hidden = _size(self.tensor(f"{sat_layout.FINAL_LAYERNORM}.weight"))
        return hidden, _size(self.tensor(f"{sat_layout.linear_name(0, 'query_key_value')}.bias"))

    def config(self, num_heads: int | None, max_sequence_length: int) -> GLMConfig:
        """Return the architecture, from the shapes of tensors.

        Args:
          num_heads: None to take it from the shape of the rotary frequencies.

        Raises:
          ConvertError: the model has another architecture, shapes that do not divide by the
            heads, or missing tensors.
        """
        if self.has_learned_positions:
            raise ConvertError(
                f"{self.shards[0].name} has learned block positions, as GLM-10B, GLM-2B and "
                "GLM-large do; this is GLM-130B's architecture, with rotary positions, and cannot "
                "run it (convert.inspect shows what it holds)"
            )
        self._refuse_duplicates()
        num_layers = self._count_layers()
        hidden, rows = self._hidden_and_rows()
        embedding = self.tensor(sat_layout.EMBEDDING)
        inner = _size(self.tensor(f"{sat_layout.linear_name(0, 'dense_h_to_4h')}.bias"))
        count = len(self.shards)
        if num_heads is None:
            if not self._frequencies:
                raise ConvertError(
                    f"{self.shards[0].name} does not say how many attention heads there are: "
                    "give --num_heads"
                )
            num_heads = hidden // (2 * self._frequencies)
        if min(hidden, num_heads, _size(embedding)) < 1:
            raise ConvertError(
                f"{self.shards[0].name}: {hidden} hidden numbers, {num_heads} heads, "
                f"{_size(embedding)} words: this is no model"
            )
        if hidden % num_heads or rows * count != 3 * hidden or num_heads % count:
            raise ConvertError(
                f"{self.shards[0].name}: hidden size {hidden} and {rows} query-key-value rows in "
                f"each of {count} shards do not divide by {num_heads} heads: check --num_heads"
            )
        vocab_size = embedding.shape[0] * count
        return GLMConfig(
            num_layers=num_layers,
            hidden_size=hidden,
            inner_hidden_size=inner * count // 2,
            num_heads=num_heads,
            vocab_size=vocab_size,
            max_sequence_length=max_sequence_length,
            rotary_dtype="float16",
            param_dtype=str(self._dtype(embedding)),
            compute_dtype=str(self._dtype(embedding)),
            special_tokens=SpecialTokens() if vocab_size == RELEASED_VOCAB_SIZE else None,
        )

    def _count_layers(self) -> int:
        """Count the layers by the names of their tensors."""
        matches = filter(None, map(_LAYER.match, self.names))
        found = sorted({int(match[1]) for match in matches})
        for expected, layer in enumerate(found):
            if layer != expected:
                raise ConvertError(
                    f"{self.shards[0].name}: it holds tensors of layer {layer}, and none of layer "
                    f"{expected}"
                )
        return len(found)

    def tensor(self, name: str, rank: int = 0) -> LazyTensor:
        shard = self.shards[rank]
        try:
            return self._modules[rank][name]
        except KeyError as error:
            other = shard.content["module"].get(name)
            is_what = f"is {other.name}" if isinstance(other, Foreign) else "is missing"
            raise ConvertError(f"{shard.name}: the tensor {name} {is_what}") from error

    def cast_count(self, config: GLMConfig) -> int:
        """Count the float tensors of another dtype than the config's, which is the embedding's."""
        names = sat_layout.shard_shapes(config, len(self.shards), self.bits(config))
        floats = (name for name in names if not name.endswith(sat_layout.SCALE))
        dtypes = [str(self._dtype(self.tensor(name))) for name in floats]
        return sum(dtype not in (config.param_dtype, "int8") for dtype in dtypes)

    def _dtype(self, tensor: LazyTensor) -> np.dtype[Any]:
        """Return the dtype that a tensor is read as."""
        return self._double_dtype if tensor.dtype == np.float64 else tensor.dtype

    def check(self, config: GLMConfig) -> None:
        """Check all names, shapes and dtypes, and tensors that each shard has whole.

        Raises:
          ConvertError: a tensor is missing or does not fit the config, or copies differ.
        """
        shapes = sat_layout.shard_shapes(config, len(self.shards), self.bits(config))
        for rank, shard in enumerate(self.shards):
            for name, shape in shapes.items():
                tensor = self.tensor(name, rank)
                if tensor.shape != shape:
                    raise ConvertError(f"{shard.name}: {name} is {tensor.shape}, expected {shape}")
                is_integer = f"{name.removesuffix('.weight')}.{sat_layout.SCALE}" in shapes
                is_integer = is_integer and name.endswith(".weight")
                if tensor.dtype.kind in "iub" and (tensor.dtype != np.int8 or not is_integer):
                    raise ConvertError(f"{shard.name}: {name} holds {tensor.dtype}, no weights")
        self._compare_copies(list(shapes))

    def _compare_copies(self, names: list[str]) -> None:
        """Compare tensors that every shard has whole; only copies with other checksums are read."""
        for name in names:
            first = self.tensor(name)
            is_split = sat_layout.merged_shape(name, first.shape, 2) != first.shape
            if is_split or name.endswith(sat_layout.SCALE):
                continue
            for rank, shard in enumerate(self.shards):
                copy = self.tensor(name, rank)
                if copy.stored_checksum == first.stored_checksum:
                    continue
                count, gap = differing(first.read(), copy.read())
                if count:
                    self.differing_copies[name] = (
                        f"{count} numbers of {shard.name}'s {name} differ from the first shard's, "
                        f"by up to {gap:.3g}"
                    )
        if self.differing_copies and not self._allow_differing_copies:
            raise ConvertError(
                f"{len(self.differing_copies)} tensors that each shard has whole differ between "
                f"shards: {next(iter(self.differing_copies.values()))}: give shards of one model, "
                "or have the first shard's taken by convert.sat_to_orbax --allow_differing_copies"
            )

    def _read(self, name: str, rank: int = 0, allocate: Allocate = np.empty) -> np.ndarray:
        tensor = self.tensor(name, rank)
        if tensor.dtype == self._dtype(tensor):
            values = tensor.read(allocate)
        else:
            values = cast(tensor.read(), self._dtype(tensor))
        if count := count_non_finite(values):
            with self._lock:
                label = name if len(self.shards) == 1 else f"{name} of rank {rank}"
                self.non_finite[label] = count
        return values

    def bits(self, config: GLMConfig) -> int | None:
        """Return 8 or 4 for a quantised checkpoint, None for a float one."""
        name = sat_layout.linear_name(0, "query_key_value")
        if f"{name}.{sat_layout.SCALE}" not in self._modules[0]:
            return None
        columns = self.tensor(f"{name}.weight").shape[1:]
        bits = 8 * math.prod(columns) / config.hidden_size
        if bits not in (4, 8):
            raise ConvertError(f"{self.shards[0].name}: {name} has {bits:g} bits, not 4 or 8")
        return int(bits)

    def embedding(self, config: GLMConfig, allocate: Allocate = np.empty) -> np.ndarray:
        """Return [vocab, embed]."""
        first = self.tensor(sat_layout.EMBEDDING)
        rows = first.shape[0]
        whole = allocate((config.vocab_size, config.hidden_size), self._dtype(first))

        def read(rank: int) -> None:
            part = whole[rank * rows : (rank + 1) * rows]
            values = self._read(sat_layout.EMBEDDING, rank, lambda shape, dtype: part)
            if values is not part:  # it was cast
                part[:] = values

        with futures.ThreadPoolExecutor(min(len(self.shards), os.cpu_count() or 1)) as pool:
            list(pool.map(read, range(len(self.shards))))
        return whole

    def final_layernorm(self) -> LayerNormParams:
        return self._layernorm(sat_layout.FINAL_LAYERNORM)

    def layer(self, config: GLMConfig, i: int) -> LayerParams:
        """Return one layer, kernels float or quantised as they are stored."""
        return self.layer_in_pieces(config, i, 1, lambda _, pieces: pieces[0])

    def layer_in_pieces(
        self,
        config: GLMConfig,
        i: int,
        pieces: int,
        put: Callable[[str, np.ndarray], Any],
        allocate: Allocate = np.empty,
    ) -> LayerParams:
        """Return layer `i` with kernels from `put`, called with a linear's name and its kernel
        [pieces, inputs, *outputs], split along the tensor axis into `pieces`."""
        parts: dict[str, Any] = {
            name: self._layernorm(sat_layout.layernorm_name(i, name))
            for name in sat_layout.LAYERNORMS
        }
        for name in glm_params.LINEAR_NAMES:
            merged = self._linear(config, i, name, pieces, allocate)
            kernel = put(name, merged.pieces)
            if merged.scales is not None:
                kernel = QuantizedArray(
                    values=kernel,
                    scales=merged.scales,
                    bits=self.bits(config) or 0,
                    contraction_axis=1 - merged.pieces.ndim,
                    axes=glm_params.KERNEL_AXES[name],
                )
            parts[name] = LinearParams(kernel, merged.bias)
        return LayerParams(**parts)

    def _layernorm(self, name: str) -> LayerNormParams:
        return LayerNormParams(self._read(f"{name}.weight"), self._read(f"{name}.bias"))

    def _linear(
        self, config: GLMConfig, i: int, name: str, pieces: int, allocate: Allocate
    ) -> sat_layout.MergedLinear:
        prefix, bits = sat_layout.linear_name(i, name), self.bits(config)

        def read(kind: str, rank: int) -> np.ndarray:
            allocate = self._buffer if kind == "weight" else np.empty
            return self._read(f"{prefix}.{kind}", rank, allocate)

        dtype, count = self._dtype(self.tensor(f"{prefix}.weight")), len(self.shards)
        return sat_layout.merge_linear(config, name, count, read, dtype, bits, pieces, allocate)

    def _buffer(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Return the calling thread's buffer, reused: new memory costs as much as reading."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        buffer = getattr(self._thread, "buffer", None)
        if buffer is None or buffer.size < size:
            buffer = self._thread.buffer = np.empty(size, np.uint8)
        return buffer[:size].view(dtype).reshape(shape)


def module(shard: TorchFile) -> dict[str, LazyTensor]:
    """Return the tensors of a shard by name.

    Raises:
      ConvertError: the file holds something else.
    """
    content = shard.content
    module = content.get("module") if isinstance(content, dict) else None
    if not isinstance(module, dict):
        raise ConvertError(f'{shard.name} is not a released shard: it holds no "module"')
    return {n: t for n, t in module.items() if isinstance(t, LazyTensor) and isinstance(n, str)}


def _pop_frequencies(modules: list[dict[str, LazyTensor]]) -> int:
    """Remove the rotary frequencies, which are computed here, and return a head's count or 0."""
    size = 0
    for module in modules:
        for name in [n for n in module if n.endswith(_FREQUENCIES)]:
            size = _size(module.pop(name))
    return size


def _size(tensor: LazyTensor) -> int:
    return tensor.shape[0] if tensor.shape else 0
