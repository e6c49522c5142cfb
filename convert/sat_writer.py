"""Write a model as shards of the released layout, layer by layer."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert import sat_layout
from convert.errors import ConvertError
from convert.file_kinds import is_plain_name
from convert.merging import MergedModel
from convert.model_readers import OpenModel, open_model
from convert.numbers import cast
from convert.torch_writer import TorchWriter
from glm_jax import files
from glm_jax.config import GLMConfig
from glm_jax.model.layers import rotary_tables
from glm_jax.model.params import LINEAR_NAMES, LayerNormParams
from glm_jax.quantization import QuantizedArray, Scheme, quantize

Parts = list[np.ndarray]  # of one tensor, by rank
ITERATION_RULE = "a name of letters, digits, '.', '-', '_' or '+', which is not 'latest'"


def is_iteration(name: str) -> bool:
    """Return whether a folder of shards can have a name."""
    return is_plain_name(name) and name != "latest"


def write_shards(
    source: Path,
    output: Path,
    shards: int,
    iteration: str = "49300",
    quantization: str | None = None,
    adapter: Path | None = None,
) -> None:
    """Write `latest` and ITERATION/mp_rank_RR_model_states.pt, floats in float16.

    The folder is named OUTPUT.partial until it is whole.

    Args:
      source: a model in any form that `open_model` takes; a quantised one keeps its integers.
      shards: number of shards.
      iteration: name of the shards' folder.
      quantization: "int8" or "int4", with a scale for each row of each shard, as by the original's
        converter; None for float16.
      adapter: a folder of adapters to merge into the kernels of a float model.

    Raises:
      ConvertError: sizes or groups do not divide into the shards, or `iteration` cannot name a
        folder.
      CheckpointError: no model at `source`.
      OutputError: the output folder is not empty, or cannot be written.
    """
    if shards < 1:
        raise ConvertError(f"--shards={shards}: at least 1")
    if not is_iteration(iteration):
        raise ConvertError(f"--iteration={iteration!r}: {ITERATION_RULE}")
    with files.whole_folder(output) as partial:
        model = open_model(source)
        if adapter is not None:
            model = MergedModel(model, adapter)
        config = model.config
        if config.vocab_size % shards or config.num_heads % shards:
            raise ConvertError(
                f"vocabulary {config.vocab_size} and {config.num_heads} heads do not divide "
                f"into {shards} shards"
            )
        scheme = None if quantization is None else Scheme(int(quantization[3:]), search=False)
        described = _described(config, shards, model.bits if scheme is None else scheme.bits)
        folder = partial / iteration
        folder.mkdir()
        paths = [folder / f"mp_rank_{rank:02d}_model_states.pt" for rank in range(shards)]
        with contextlib.ExitStack() as stack:
            writers = [stack.enter_context(TorchWriter(path, described)) for path in paths]
            for name, tensors in _tensors(model, shards, scheme):
                for writer, tensor in zip(writers, tensors, strict=True):
                    writer.write(name, tensor)
        files.write_text(partial / "latest", iteration)
    print(f"wrote {output}: {shards} shards of {len(described)} tensors")


def _described(
    config: GLMConfig, shards: int, bits: int | None
) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Return shape and dtype of each tensor of a shard, in order: a file begins with them."""
    shapes = sat_layout.shard_shapes(config, shards, bits)
    shapes |= dict.fromkeys(sat_layout.frequency_names(config), (config.head_dim // 2,))
    is_packed = lambda name: bits is not None and f"{name}_scale" in shapes
    return {
        name: (shape, np.int8 if is_packed(name) else np.float16) for name, shape in shapes.items()
    }


def _tensors(model: OpenModel, shards: int, scheme: Scheme | None) -> Iterator[tuple[str, Parts]]:
    """Yield the released name of each tensor of `model`, and its parts by rank."""
    yield from released_tensors(model, shards, _to_float16, scheme)
    frequencies = _to_float16(rotary_tables(model.config)[0])
    for name in sat_layout.frequency_names(model.config):
        yield name, [frequencies] * shards


def released_tensors(
    model: OpenModel,
    shards: int,
    convert: Callable[[Any], np.ndarray],
    scheme: Scheme | None = None,
) -> Iterator[tuple[str, Parts]]:
    """Yield the released name of each tensor of a model but the rotary frequencies, in the
    original's order, and its parts by rank.

    Args:
      convert: makes an array of a float tensor, such as by a cast.
      scheme: quantises each shard's weights; None leaves them as they are.
    """

    def of_norm(name: str, norm: LayerNormParams) -> Iterator[tuple[str, Parts]]:
        yield f"{name}.weight", [convert(norm.scale)] * shards
        yield f"{name}.bias", [convert(norm.bias)] * shards

    yield sat_layout.EMBEDDING, np.split(convert(model.embedding()), shards)
    for i, layer in enumerate(model.layers()):
        for name in sat_layout.LAYERNORMS:
            yield from of_norm(sat_layout.layernorm_name(i, name), getattr(layer, name))
        for name in LINEAR_NAMES:
            linear, prefix = getattr(layer, name), sat_layout.linear_name(i, name)
            weights, scales = _weights(name, linear.kernel, shards, convert, scheme)
            yield f"{prefix}.weight", weights
            yield f"{prefix}.bias", sat_layout.split_bias(name, convert(linear.bias), shards)
            if scales is not None:
                yield f"{prefix}.{sat_layout.SCALE}", scales
    yield from of_norm(sat_layout.FINAL_LAYERNORM, model.final_layernorm())


def _weights(
    name: str,
    kernel: Any,
    shards: int,
    convert: Callable[[Any], np.ndarray],
    scheme: Scheme | None,
) -> tuple[Parts, Parts | None]:
    """Return each shard's weight [outputs, inputs], and its scales if it is quantised."""
    if isinstance(kernel, QuantizedArray):
        return _split_quantized(name, kernel, shards)
    weights = sat_layout.split_kernel(name, convert(kernel), shards)
    return (weights, None) if scheme is None else _quantized(weights, scheme)


def _to_float16(x: Any) -> np.ndarray:
    return cast(x, np.float16)


def _quantized(weights: Parts, scheme: Scheme) -> tuple[Parts, Parts]:
    """Return each shard's [outputs, inputs] as integers, and their scales, one a row."""
    arrays = [quantize(jnp.asarray(weight), scheme, -1) for weight in weights]
    values = [np.asarray(array.values) for array in arrays]
    return values, [np.asarray(array.scales).reshape(-1) for array in arrays]


def _split_quantized(name: str, kernel: QuantizedArray, shards: int) -> tuple[Parts, Parts]:
    groups = 1 if name in sat_layout.COLUMN_PARALLEL else shards
    if kernel.zero_points is not None or kernel.groups != groups:
        raise ConvertError(
            f"{name} is quantised in {kernel.groups} groups of inputs"
            f"{'' if kernel.zero_points is None else ' with zero points'}; {shards} shards of the "
            f"released layout have {groups}: write them from the float model"
        )
    scales = sat_layout.split_kernel(name, _to_float16(kernel.scales), shards)
    return (
        sat_layout.split_kernel(name, np.asarray(kernel.values), shards),
        [part.reshape(-1) for part in scales],
    )
