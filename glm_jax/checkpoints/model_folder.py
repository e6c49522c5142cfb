"""A model on disk: `config.json`, the parameters in Orbax (`parts`), the tokenizer beside.

A folder is written under another name and renamed when whole, so that a path either
holds a complete model or nothing.
"""

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from glm_jax import files, processes, tokenizer
from glm_jax.checkpoints import folder_kinds, parameter_files
from glm_jax.checkpoints.adapter_folder import load_adapter, load_adapters, model_identity
from glm_jax.checkpoints.array_reader import array_name, reusing_memory
from glm_jax.checkpoints.checksums import CHECKSUMS_FILE, checked_files, write_checksums
from glm_jax.checkpoints.folder_kinds import CONFIG_FILE as CONFIG_FILE
from glm_jax.checkpoints.layer_assembly import HostStack, Part, gathered
from glm_jax.checkpoints.parameter_files import PARAMS_FOLDER, CheckpointError
from glm_jax.config import ConfigError, GLMConfig
from glm_jax.errors import UserError
from glm_jax.model import adapters
from glm_jax.model import params as glm_params
from glm_jax.model.abstract_params import abstract_quantized
from glm_jax.model.layer_stacks import as_layers
from glm_jax.model.params import LINEAR_NAMES, GLMParams, LayerParams, is_row_parallel
from glm_jax.model.streamed_layers import device_bytes
from glm_jax.numerics import array_dtype
from glm_jax.quantization import QuantizationError, QuantizedArray, Scheme, WeightFormat
from glm_jax.quantization.formats import format_of

_FORMAT = "weight_format"  # its field beside those of `GLMConfig`
_PART_BYTES = 4 << 30
_EDITABLE = (CONFIG_FILE, tokenizer.MODEL_FILE, tokenizer.CONFIG_FILE)


def save_model(
    path: str | os.PathLike[str],
    config: GLMConfig,
    params: GLMParams,
    extra_files: tuple[Path, ...] = (),
) -> None:
    """Write a model folder; of several processes each its own parts, all calling this.

    Args:
      path: a folder that does not exist yet, or is empty.
      params: float or quantised, layers stacked or a tuple; arrays of jax or numpy.
      extra_files: a tokenizer's, copied into the folder under the names that it reads.

    Raises:
      OutputError: the folder holds something already, or cannot be written.
    """
    layers = as_layers(params.layers)
    with files.whole_folder(path) as partial:
        folder = partial / PARAMS_FOLDER
        step = _layers_a_part(config, params.layers)
        for first in range(0, config.num_layers, step):
            end = min(first + step, config.num_layers)
            some = layers.stacked(first, end)
            stored = format_in_memory(config, some)
            parameter_files.write_part(folder, parameter_files.layers_part(first, end), some)
        parameter_files.write_part(
            folder, parameter_files.EMBEDDING, parameter_files.embedding_tree(params)
        )
        if processes.is_first():
            describe_model(partial, config, stored, extra_files)


def _layers_a_part(config: GLMConfig, layers: Any) -> int:
    """Return how many layers go into a part: what a single device that reads it has room for."""
    size = sum(x.nbytes for x in jax.tree.leaves(layers)) // config.num_layers
    return max(1, min(config.num_layers, _PART_BYTES // max(size, 1)))


def describe_model(
    partial: Path,
    config: GLMConfig,
    stored: WeightFormat,
    extra_files: tuple[Path, ...] = (),
    checksums: dict[str, int] | None = None,
) -> None:
    """Put beside all parameters what makes their folder a model folder.

    Args:
      stored: the format of the kernels, which `config.json` names.
      checksums: of arrays that lie in the folder itself; those of parts lie with them.
    """
    for file in extra_files:
        # A released tokenizer has a name of its own; `Tokenizer` reads a folder's by this one.
        is_config = file.name == tokenizer.CONFIG_FILE
        shutil.copy2(file, partial / (file.name if is_config else tokenizer.MODEL_FILE))
    content = dataclasses.asdict(config) | {_FORMAT: stored.name}
    files.write_text(partial / CONFIG_FILE, json.dumps(content, indent=2) + "\n")
    of_parts = (partial / PARAMS_FOLDER).glob(f"*/{CHECKSUMS_FILE}")
    write_checksums(partial, (*partial.iterdir(), *of_parts), checksums or {})


def load_config(path: str | os.PathLike[str]) -> GLMConfig:
    """Return the config of a model folder.

    Raises:
      CheckpointError: there is none, or it cannot be read; says what the folder is instead.
    """
    config = read_config(path)
    if not (Path(path) / PARAMS_FOLDER).is_dir():
        raise CheckpointError(_no_model(path, PARAMS_FOLDER, "no complete parameters"))
    return config


def read_config(path: str | os.PathLike[str]) -> GLMConfig:
    """`load_config` of a folder that may hold its parameters in another form.

    Raises:
      CheckpointError: there is none, or it cannot be read; says what the folder is instead.
    """
    return _read_config(path)[0]


def _read_config(path: str | os.PathLike[str]) -> tuple[GLMConfig, WeightFormat]:
    file = Path(path) / CONFIG_FILE
    fields = files.read_json(file, CheckpointError, lambda: _no_model(path, CONFIG_FILE))
    name = fields.pop(_FORMAT, None) if isinstance(fields, dict) else None
    try:
        config = GLMConfig.from_dict(fields)
    except ConfigError as error:
        raise _refused(file, error, has_other_config=True) from error
    try:
        if name is None:
            raise ConfigError(
                f"it names no {_FORMAT}: add what the kernels are stored as, such as "
                f'"{_FORMAT}": "{config.param_dtype}", or convert the model again'
            )
        return config, WeightFormat.parse(name)
    except (ConfigError, QuantizationError) as error:
        raise _refused(file, error) from error


def _refused(file: Path, error: UserError, has_other_config: bool = False) -> CheckpointError:
    hint = ""
    if not folder_kinds.is_model(file.parent):
        hint = f": {folder_kinds.described(file.parent, has_other_config)}"
    return CheckpointError(f"{file}: {error}{hint}")


def _no_model(path: str | os.PathLike[str], missing: str, lacks: str = "no model") -> str:
    return f"{path} holds {lacks} ({missing} is missing): {folder_kinds.described(path)}"


def check_files(path: str | os.PathLike[str]) -> dict[str, int]:
    """Check the files of a model folder that lie beside its parameters.

    Returns:
      The checksums of arrays among them.

    Raises:
      DamageError: one is missing, or is not what was written.
    """
    with parameter_files.readable(Path(path)):
        return checked_files(Path(path), _EDITABLE)


def check_model(path: str | os.PathLike[str]) -> None:
    """Read all of a model folder, which compares it with its checksums.

    Raises:
      CheckpointError: no complete model there.
      DamageError: a file or an array is not what was written.
    """
    config = load_config(path)
    folder = Path(path).absolute() / PARAMS_FOLDER
    parameter_files.layer_ranges(folder, config.num_layers)
    check_files(path)
    parameter_files.check_parts(folder)


def stored_format(path: str | os.PathLike[str]) -> WeightFormat:
    """Return the format of a model folder's kernels.

    Raises:
      CheckpointError: there is no model, or its config names no format.
    """
    return _read_config(path)[1]


def format_in_memory(config: GLMConfig, layers: LayerParams) -> WeightFormat:
    """Return the format of stacked layers; the config's param_dtype where they are floats.

    Raises:
      CheckpointError: the kernels are quantised in ways that no format names.
    """
    kernels = [getattr(layers, name).kernel for name in LINEAR_NAMES]
    if not isinstance(kernels[0], QuantizedArray):
        return WeightFormat(config.param_dtype)
    sizes = [
        (kernel.shape[kernel.contraction_axis], is_row_parallel(name), kernel.groups)
        for name, kernel in zip(LINEAR_NAMES, kernels, strict=True)
    ]
    stored = format_of(kernels[0].stored_dtype, kernels[0].zero_points is not None, sizes)
    if stored is None:
        raise CheckpointError(
            f"the kernels' groups of inputs ({sizes}) are no format's: quantise all in one way"
        )
    return stored


def restore(
    path: str | os.PathLike[str],
    mesh: Mesh | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
    weight_memory_limit: float | None = None,
    adapter: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None = None,
    is_stacked: bool = False,
    layout: Callable[[LayerParams], LayerParams] | None = None,
) -> tuple[GLMConfig, GLMParams]:
    """Read a model onto a mesh; each device reads its own slices.

    Parts are quantised and cast as they come, so that of a model converted layer by layer
    no more than one layer is there as it is stored.

    Args:
      path: a model folder.
      mesh: where the parameters go, one device by default.
      dtype: for parameters and computation, one of `COMPUTE_DTYPES`; as stored by default.
      quantization: quantises a float model after reading: "int8", "int4", or with options
        such as "int4,group=128,zero_point" (`Scheme.parse`).
      weight_memory_limit: GiB of weights that a device may hold; blocks beyond it wait in its
        host's memory (`OffloadedLayers`). While a part is read, it comes on top.
      adapter: a folder of adapters that were trained on this model; they stay beside its
        kernels, which may be quantised. Or several folders by name, of which each request uses one
        or none: `Prompt.adapter` is 1 for the first, 0 for none.
      is_stacked: keep layers stacked on every device, as a train step of a deep model loops over
        them.
      layout: changes the stacked layers of each part as it is read, after quantising and casting.

    Returns:
      The config, and the parameters in the form that runs there: layers stacked on CPUs, on
      other devices a tuple of them, unless `is_stacked`.

    Raises:
      CheckpointError: no complete model there, or one quantised in another way; no adapters,
        or another model's.
      DamageError: a file or an array is not what was written.
      QuantizationError: `quantization` says nothing known, or groups do not divide.
      MeshError: the shapes do not divide over the mesh.
      OffloadError: the limit leaves no room for two blocks.
    """
    scheme = None if quantization is None else Scheme.parse(quantization)
    config, stored = load_config(path), stored_format(path)
    if scheme is not None and stored.is_quantized:
        _check_same(path, stored, scheme)
        scheme = None
    folder = Path(path).absolute() / PARAMS_FOLDER
    ranges = parameter_files.layer_ranges(folder, config.num_layers)
    check_files(path)
    described = parameter_files.on_mesh_or_one_device(glm_params.abstract(config, mesh), mesh)

    def cast(part: Any) -> Any:
        return part if dtype is None else glm_params.cast_params(part, array_dtype(dtype))

    def read(first: int, end: int) -> Any:
        part = restore_layers(folder, config, stored, first, end, mesh)
        part = cast(part if scheme is None else glm_params.quantize_layers(part, scheme))
        return part if layout is None else layout(part)

    layers: Any
    limit = math.inf if weight_memory_limit is None else weight_memory_limit
    with reusing_memory():
        metadata = parameter_files.part_metadata(folder, parameter_files.EMBEDDING)
        target = parameter_files.embedding_tree(described)
        rest = cast(parameter_files.read_part(folder, parameter_files.EMBEDDING, target, metadata))
        changes = (scheme, dtype, weight_memory_limit, layout)
        is_as_stored = all(change is None for change in changes)
        if is_as_stored and _is_on_cpu(described):
            layers = _read_into_stack(folder, config, stored, ranges, mesh)
        else:
            read_parts = (Part(first, end, read(first, end)) for first, end in ranges)
            rest_bytes = device_bytes(rest)
            layers = gathered(read_parts, config.num_layers, rest_bytes, limit, is_stacked)
    if dtype is not None:
        config = config.replace(param_dtype=array_dtype(dtype), compute_dtype=dtype)
    params = GLMParams(layers=layers, **rest)
    if adapter is not None:
        identity = model_identity(Path(path), config)
        if isinstance(adapter, Mapping):
            several = load_adapters(adapter, config, identity, mesh)
            params = adapters.attach_several(params, several, config.activation_dtype)
            return config, params
        trained, pairs = load_adapter(adapter, config, identity, mesh)
        pairs = glm_params.cast_params(pairs, config.activation_dtype)
        params = adapters.attach(params, pairs, trained.scale)
    return config, params


def _is_on_cpu(described: GLMParams) -> bool:
    sharding = described.word_embeddings.sharding
    return next(iter(sharding.device_set)).platform == "cpu"


def _check_same(path: Any, stored: WeightFormat, scheme: Scheme) -> None:
    """Raise CheckpointError where a quantised model would have to become another one."""
    is_other = (
        stored.dtype != scheme.format.dtype
        or scheme.group_size not in (None, stored.group_size)
        or (scheme.zero_point and not stored.zero_point)
    )
    if is_other:
        raise CheckpointError(
            f"{path} is stored as {stored.name} already and cannot become {scheme.format.name}: "
            "quantise the float model"
        )


def _read_into_stack(
    folder: Path,
    config: GLMConfig,
    stored: WeightFormat,
    ranges: list[tuple[int, int]],
    mesh: Mesh | None,
) -> LayerParams:
    """Return all layers as they are stored, each part read to its position in the stack."""
    stack = HostStack(config.num_layers, False)
    for first, end in ranges:
        name, target, metadata = _described_part(folder, config, stored, first, end, mesh)
        # One after another: they share the disk, and buffers that are used again.
        parameter_files.read_part_into(folder, name, target, stack.room(target, first), metadata)
    return stack.finish()


def restore_layers(
    folder: Path,
    config: GLMConfig,
    stored: WeightFormat,
    first: int,
    end: int,
    mesh: Mesh | None = None,
) -> LayerParams:
    """Return a part's layers, stacked, as they are stored.

    Args:
      folder: the model folder's `PARAMS_FOLDER`.
    """
    return parameter_files.read_part(
        folder, *_described_part(folder, config, stored, first, end, mesh)
    )


def _described_part(
    folder: Path,
    config: GLMConfig,
    stored: WeightFormat,
    first: int,
    end: int,
    mesh: Mesh | None,
) -> tuple[str, LayerParams, Any]:
    """Return a part's name, its layers as a format says that they are stored (scales in their own
    dtype), and its metadata."""
    name = parameter_files.layers_part(first, end)
    metadata = parameter_files.part_metadata(folder, name)
    config = config.replace(num_layers=end - first)
    if stored.is_quantized:
        arrays = jax.tree_util.tree_leaves_with_path(metadata)
        scales = (x.dtype for path, x in arrays if array_name(path).endswith(".scales"))
        tree = abstract_quantized(config, mesh, stored, next(scales, None))
    else:
        tree = glm_params.abstract(config, mesh)
    return name, parameter_files.on_mesh_or_one_device(tree.layers, mesh), metadata
