"""Finds a released checkpoint's shards and joins their tensors one by one."""

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import serialization
from tqdm import tqdm

from convert import sat_layout
from convert.errors import ConvertError
from convert.torch_file import LazyTensor, TorchFile
from glm_jax.config import RELEASED_VOCAB_SIZE, GLMConfig, SpecialTokens
from glm_jax.model import params as glm_params
from glm_jax.model.checkpoint import refuse_non_empty, save_model
from glm_jax.model.params import GLMParams, LayerNormParams, LayerParams, LinearParams
from glm_jax.quantization import QuantizedArray
from glm_jax.tokenizer import Tokenizer

_SHARD = re.compile(r"mp_rank_(\d\d+)_model_states\.pt")


def find_shards(folder: Path) -> list[Path]:
    """The shard files in order of rank.

    Args:
      folder: holds `latest` and the iteration's folder that it names, or is the latter.

    Raises:
      ConvertError: no shards, or ranks missing between the first and the last.
    """
    if not folder.is_dir():
        raise ConvertError(f"{folder} is not a folder: give the one that holds `latest`")
    latest = folder / "latest"
    if latest.is_file():
        iteration = latest.read_text(encoding="utf-8").strip()
        folder = folder / iteration
        if not iteration or not folder.is_dir():
            raise ConvertError(f"{latest} names {iteration!r}, but {folder} is not a folder")
    ranks = {
        int(match[1]): path for path in folder.iterdir() if (match := _SHARD.fullmatch(path.name))
    }
    if not ranks:
        raise ConvertError(f"{folder} holds no mp_rank_RR_model_states.pt")
    missing = sorted(set(range(max(ranks) + 1)) - set(ranks))
    if missing:
        raise ConvertError(
            f"{folder}: the shard mp_rank_{missing[0]:02d}_model_states.pt is missing"
        )
    return [ranks[rank] for rank in sorted(ranks)]


class SatCheckpoint:
    """All shards of a released checkpoint, opened but not read.

    Raises:
      ConvertError: a shard cannot be read, or shards do not belong together.
    """

    def __init__(self, folder: Path):
        self.paths = find_shards(folder)
        self._shards = [_module(path) for path in self.paths]
        first = self._shards[0]
        for path, shard in zip(self.paths, self._shards, strict=True):
            for name in sorted(set(first) ^ set(shard)):
                raise ConvertError(f"{path} and {self.paths[0]} differ: only one has {name}")
            for name, tensor in shard.items():
                if tensor.shape != first[name].shape or tensor.dtype != first[name].dtype:
                    raise ConvertError(
                        f"{path}: {name} is {tensor.dtype} {tensor.shape}, in {self.paths[0]} "
                        f"it is {first[name].dtype} {first[name].shape}"
                    )

    def config(self, num_heads: int, max_sequence_length: int) -> GLMConfig:
        """The architecture that the shapes tell; heads and positions they do not.

        Raises:
          ConvertError: shapes that do not fit the heads, or missing tensors.
        """
        hidden = self.tensor(f"{sat_layout.FINAL_LAYERNORM}.weight").shape[0]
        embedding = self.tensor(sat_layout.EMBEDDING)
        inner = self.tensor(f"{sat_layout.linear_name(0, 'dense_h_to_4h')}.bias").shape[0]
        rows = self.tensor(f"{sat_layout.linear_name(0, 'query_key_value')}.bias").shape[0]
        count = len(self.paths)
        if hidden % num_heads or rows * count != 3 * hidden or num_heads % count:
            raise ConvertError(
                f"{self.paths[0].parent}: hidden size {hidden} and {rows} query-key-value rows in "
                f"each of {count} shards do not divide by {num_heads} heads: check --num_heads"
            )
        numbers = [re.match(r"transformer\.layers\.(\d+)\.", name) for name in self._shards[0]]
        vocab_size = embedding.shape[0] * count
        return GLMConfig(
            num_layers=1 + max(int(match[1]) for match in numbers if match),
            hidden_size=hidden,
            inner_hidden_size=inner * count // 2,
            num_heads=num_heads,
            vocab_size=vocab_size,
            max_sequence_length=max_sequence_length,
            rotary_dtype="float16",
            param_dtype=str(embedding.dtype),
            compute_dtype=str(embedding.dtype),
            special_tokens=SpecialTokens() if vocab_size == RELEASED_VOCAB_SIZE else None,
        )

    def tensor(self, name: str, shard: int = 0) -> LazyTensor:
        try:
            return self._shards[shard][name]
        except KeyError as error:
            raise ConvertError(f"{self.paths[shard]}: the tensor {name} is missing") from error

    def read(self, name: str, shape: tuple[int, ...], shard: int = 0) -> np.ndarray:
        """One shard's tensor, checked against the shape that the config asks for."""
        tensor = self.tensor(name, shard)
        if tensor.shape != shape:
            raise ConvertError(f"{self.paths[shard]}: {name} is {tensor.shape}, expected {shape}")
        return tensor.read()

    def params(self, config: GLMConfig) -> GLMParams:
        """The whole tree in numpy arrays, layers stacked."""
        count = range(len(self.paths))
        rows = (config.vocab_size // len(self.paths), config.hidden_size)
        layers: Any = None
        for i in tqdm(range(config.num_layers), desc="converting layers", unit="layer"):
            layer = serialization.to_state_dict(self._layer(config, i))
            if layers is None:
                layers = jax.tree.map(
                    lambda x: np.empty((config.num_layers, *x.shape), x.dtype), layer
                )
            jax.tree.map(lambda stack, x, i=i: stack.__setitem__(i, x), layers, layer)
        template = self._template(config)
        return GLMParams(
            word_embeddings=np.concatenate(
                [self.read(sat_layout.EMBEDDING, rows, r) for r in count]
            ),
            layers=serialization.from_state_dict(template, layers),
            final_layernorm=self._layernorm(config, sat_layout.FINAL_LAYERNORM),
        )

    def bits(self, config: GLMConfig) -> int | None:
        """8 or 4 for a quantised checkpoint, None for a float one."""
        name = sat_layout.linear_name(0, "query_key_value")
        if f"{name}.weight_scale" not in self._shards[0]:
            return None
        return 8 * self.tensor(f"{name}.weight").shape[1] // config.hidden_size

    def _template(self, config: GLMConfig) -> LayerParams:
        """Stacked layers whose kernels are of the kind that this checkpoint has."""
        template = glm_params.abstract(config)
        bits = self.bits(config)
        if bits is not None:
            template = glm_params.map_linears(
                lambda name, linear: LinearParams(
                    QuantizedArray(
                        None,
                        None,
                        bits,
                        glm_params.contraction_axis(linear.kernel),
                        axes=glm_params.KERNEL_AXES[name],
                    ),
                    linear.bias,
                ),
                template,
            )
        layers: Any = template.layers
        return layers

    def _layer(self, config: GLMConfig, i: int) -> LayerParams:
        parts: dict[str, Any] = {
            name: self._layernorm(config, sat_layout.layernorm_name(i, name))
            for name in sat_layout.LAYERNORMS
        }
        parts |= {name: self._linear(config, i, name) for name in glm_params.LINEAR_NAMES}
        return LayerParams(**parts)

    def _layernorm(self, config: GLMConfig, name: str) -> LayerNormParams:
        shape = (config.hidden_size,)
        return LayerNormParams(
            scale=self.read(f"{name}.weight", shape), bias=self.read(f"{name}.bias", shape)
        )

    def _linear(self, config: GLMConfig, i: int, name: str) -> LinearParams:
        prefix, count, bits = sat_layout.linear_name(i, name), len(self.paths), self.bits(config)
        outputs = int(np.prod(sat_layout.output_shape(config, name)))
        inputs = config.inner_hidden_size if name == "dense_4h_to_h" else config.hidden_size
        if name in sat_layout.COLUMN_PARALLEL:
            outputs //= count
        else:
            inputs //= count
        stored_inputs = inputs if bits is None else inputs * bits // 8
        ranks = range(count)
        merged = sat_layout.merge_linear(
            config,
            name,
            [self.read(f"{prefix}.weight", (outputs, stored_inputs), r) for r in ranks],
            [self.read(f"{prefix}.bias", (outputs,), r) for r in ranks],
            None
            if bits is None
            else [self.read(f"{prefix}.weight_scale", (outputs,), r) for r in ranks],
        )
        if bits is None:
            return LinearParams(merged.kernel, merged.bias)
        kernel = QuantizedArray(
            values=merged.kernel,
            scales=merged.scales,
            bits=bits,
            contraction_axis=-merged.kernel.ndim,
            axes=glm_params.KERNEL_AXES[name],
        )
        return LinearParams(kernel, merged.bias)


def _module(path: Path) -> dict[str, LazyTensor]:
    content = TorchFile(path).content
    module = content.get("module") if isinstance(content, dict) else None
    if not isinstance(module, dict):
        raise ConvertError(f'{path} is not a released shard: it holds no "module"')
    tensors = {n: t for n, t in module.items() if isinstance(t, LazyTensor)}
    return {n: t for n, t in tensors.items() if not n.endswith("rotary_emb.inv_freq")}


def convert_shards(
    source: Path,
    output: Path,
    num_heads: int,
    max_sequence_length: int = 2048,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Reads every shard by memory map and writes a model folder.

    Raises:
      ConvertError: the input is not a whole released checkpoint.
      CheckpointError: the output folder is not empty.
    """
    refuse_non_empty(output)
    checkpoint = SatCheckpoint(source)
    config = checkpoint.config(num_heads, max_sequence_length)
    if tokenizer is not None:
        config = config.replace(special_tokens=tokenizer.special_tokens)
    params = checkpoint.params(config)
    save_model(output, config, params, () if tokenizer is None else tokenizer.files)
    bits = checkpoint.bits(config)
    kind = config.param_dtype if bits is None else f"int{bits}"
    print(
        f"wrote {output}: {glm_params.parameter_count(config):,} parameters, {kind}, "
        f"from {len(checkpoint.paths)} shards"
    )
