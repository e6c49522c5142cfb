"""Write a model as shards of the released layout, layer by layer."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert import sat_layout
from convert.errors import ConvertError
from convert.file_kinds import is_plain_name
from convert.merging import open_with
from convert.model_readers import OpenModel
from convert.numbers import cast
from convert.torch_writer import TorchWriter
from glm_jax import files
from glm_jax.config import GLMConfig
from glm_jax.model.layers import rotary_tables
from glm_jax.model.params import LINEAR_NAMES, LinearParams
from glm_jax.quantization import Scheme, quantize

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
        model = open_with(source, adapter)
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
    """Yield the released name of each tensor, and its parts by rank."""
    yield sat_layout.EMBEDDING, np.split(_to_float16(model.embedding()), shards)
    for i, layer in enumerate(model.layers()):
        yield from _layer_tensors(layer, i, shards, scheme, model.bits is not None)
    yield from _last_tensors(model, shards)


def _layer_tensors(
    layer: Any, i: int, shards: int, scheme: Scheme | None, is_quantized: bool
) -> Iterator[tuple[str, Parts]]:
    for name in sat_layout.LAYERNORMS:
        norm, prefix = getattr(layer, name), sat_layout.layernorm_name(i, name)
        yield f"{prefix}.weight", [_to_float16(norm.scale)] * shards
        yield f"{prefix}.bias", [_to_float16(norm.bias)] * shards
    for name in LINEAR_NAMES:
        linear, prefix = getattr(layer, name), sat_layout.linear_name(i, name)
        if is_quantized:
            weights, scales = _split_quantized(name, linear, shards)
        else:
            weights = sat_layout.split_kernel(name, _to_float16(linear.kernel), shards)
            scales = None
            if scheme is not None:
                weights, scales = _quantized(weights, scheme)
        yield f"{prefix}.weight", weights
        yield f"{prefix}.bias", sat_layout.split_bias(name, _to_float16(linear.bias), shards)
        if scales is not None:
            yield f"{prefix}.{sat_layout.SCALE}", scales


def _last_tensors(model: OpenModel, shards: int) -> Iterator[tuple[str, Parts]]:
    last = model.final_layernorm()
    yield f"{sat_layout.FINAL_LAYERNORM}.weight", [_to_float16(last.scale)] * shards
    yield f"{sat_layout.FINAL_LAYERNORM}.bias", [_to_float16(last.bias)] * shards
    frequencies = _to_float16(rotary_tables(model.config)[0])
    for name in sat_layout.frequency_names(model.config):
        yield name, [frequencies] * shards


def _to_float16(x: Any) -> np.ndarray:
    return cast(x, np.float16)


def _quantized(weights: Parts, scheme: Scheme) -> tuple[Parts, Parts]:
    """Return each shard's [outputs, inputs] as integers, and their scales, one a row."""
    arrays = [quantize(jnp.asarray(weight), scheme, -1) for weight in weights]
    values = [np.asarray(array.values) for array in arrays]
    return values, [np.asarray(array.scales).reshape(-1) for array in arrays]


def _split_quantized(name: str, linear: LinearParams, shards: int) -> tuple[Parts, Parts]:
    kernel = linear.kernel
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
