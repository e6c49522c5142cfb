"""A model on disk: `config.json`, the parameters in Orbax (`parts`), the tokenizer beside.

A folder is written under another name and renamed when whole, so that a path either
holds a complete model or nothing.
"""

import math
import os
import shutil
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from glm_jax import files, processes, tokenizer
from glm_jax.checkpoints import parameter_files
from glm_jax.checkpoints.adapter_folder import load_adapter, model_identity
from glm_jax.checkpoints.array_reader import reusing_memory
from glm_jax.checkpoints.checksums import CHECKSUMS_FILE, checked_files, write_checksums
from glm_jax.checkpoints.layer_assembly import HostStack, Part, gathered
from glm_jax.checkpoints.parameter_files import PARAMS_FOLDER, CheckpointError
from glm_jax.config import ConfigError, GLMConfig
from glm_jax.model import adapters
from glm_jax.model import params as glm_params
from glm_jax.model.params import KERNEL_AXES, GLMParams, LayerParams, LinearParams
from glm_jax.model.streamed_layers import device_bytes
from glm_jax.numerics import array_dtype
from glm_jax.quantization import QuantizedArray, Scheme

CONFIG_FILE = "config.json"
_PART_BYTES = 4 << 30
_EDITABLE = (CONFIG_FILE, tokenizer.MODEL_FILE, tokenizer.CONFIG_FILE)


def save_model(
    path: str | os.PathLike[str],
    config: GLMConfig,
    params: GLMParams,
    extra_files: tuple[Path, ...] = (),
) -> None:
    """Writes a model folder; of several processes each its own parts, all calling this.

    Args:
      path: a folder that does not exist yet, or is empty.
      params: float or quantised, layers stacked or a tuple; arrays of jax or numpy.
      extra_files: copied into the folder (a tokenizer's files).

    Raises:
      OutputError: the folder holds something already, or cannot be written.
    """
    with files.whole_folder(path) as partial:
        folder = partial / PARAMS_FOLDER
        step = _layers_a_part(config, params.layers)
        for first in range(0, config.num_layers, step):
            end = min(first + step, config.num_layers)
            some = glm_params.some_layers(params.layers, first, end)
            parameter_files.write_part(folder, parameter_files.layers_part(first, end), some)
        parameter_files.write_part(
            folder, parameter_files.EMBEDDING, parameter_files.embedding_tree(params)
        )
        if processes.is_first():
            describe_model(partial, config, extra_files)


def _layers_a_part(config: GLMConfig, layers: Any) -> int:
    """As many as what reads a part, and no mesh, has room for."""
    size = sum(x.nbytes for x in jax.tree.leaves(layers)) // config.num_layers
    return max(1, min(config.num_layers, _PART_BYTES // max(size, 1)))


def describe_model(
    partial: Path,
    config: GLMConfig,
    extra_files: tuple[Path, ...] = (),
    checksums: dict[str, int] | None = None,
) -> None:
    """Puts beside all parameters what makes their folder a model folder.

    Args:
      checksums: of arrays that lie in the folder itself; those of parts lie with them.
    """
    for file in extra_files:
        shutil.copy2(file, partial / file.name)
    files.write_text(partial / CONFIG_FILE, config.to_json())
    of_parts = (partial / PARAMS_FOLDER).glob(f"*/{CHECKSUMS_FILE}")
    write_checksums(partial, (*partial.iterdir(), *of_parts), checksums or {})


def load_config(path: str | os.PathLike[str]) -> GLMConfig:
    """The config of a model folder.

    Raises:
      CheckpointError: there is none, or it cannot be read.
    """
    file = Path(path) / CONFIG_FILE
    if_missing = (
        f"{path} holds no model ({CONFIG_FILE} is missing): give a folder that a converter, "
        "a training run's export or save_model wrote"
    )
    fields = files.read_json(file, CheckpointError, if_missing)
    try:
        return GLMConfig.from_dict(fields)
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error


def check_files(path: str | os.PathLike[str]) -> dict[str, int] | None:
    """Checks the files of a model folder that lie beside its parameters.

    Returns:
      The checksums of arrays among them; None for a folder without checksums.

    Raises:
      DamageError: one is missing, or is not what was written.
    """
    with parameter_files.readable(Path(path)):
        return checked_files(Path(path), _EDITABLE)


def stored_bits(path: str | os.PathLike[str], config: GLMConfig) -> int | None:
    """8 or 4 where a model folder holds its kernels as integers, else None."""
    folder = Path(path).absolute() / PARAMS_FOLDER
    first = parameter_files.layer_ranges(folder, config.num_layers)[0]
    stored = parameter_files.part_metadata(folder, parameter_files.layers_part(*first))[
        "query_key_value"
    ]["kernel"]
    is_quantized = isinstance(stored, dict)
    return 8 * stored["values"].shape[1] // config.hidden_size if is_quantized else None


def restore(
    path: str | os.PathLike[str],
    mesh: Mesh | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
    weight_memory_limit: float | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> tuple[GLMConfig, GLMParams]:
    """Reads a model onto a mesh; each device reads its own slices.

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
        kernels, which may be quantised.

    Returns:
      The config, and the parameters in the form that runs there: layers stacked on CPUs, on
      other devices a tuple of them.

    Raises:
      CheckpointError: no complete model there, or one quantised in another way; no adapters,
        or another model's.
      DamageError: a file or an array is not what was written.
      QuantizationError: `quantization` says nothing known, or groups do not divide.
      MeshError: the shapes do not divide over the mesh.
      OffloadError: the limit leaves no room for two blocks.
    """
    scheme = None if quantization is None else Scheme.parse(quantization)
    config = load_config(path)
    folder = Path(path).absolute() / PARAMS_FOLDER
    ranges = parameter_files.layer_ranges(folder, config.num_layers)
    check_files(path)
    described = _abstract(config, mesh)

    def cast(part: Any) -> Any:
        return part if dtype is None else glm_params.cast_params(part, array_dtype(dtype))

    def read(first: int, end: int) -> Any:
        part = restore_layers(folder, config, first, end, mesh)
        return cast(part if scheme is None else _quantize_restored(part, scheme, path))

    layers: Any
    limit = math.inf if weight_memory_limit is None else weight_memory_limit
    with reusing_memory():
        metadata = parameter_files.part_metadata(folder, parameter_files.EMBEDDING)
        target = parameter_files.embedding_tree(described)
        rest = cast(parameter_files.read_part(folder, parameter_files.EMBEDDING, target, metadata))
        is_as_stored = scheme is None and dtype is None and weight_memory_limit is None
        if is_as_stored and _is_on_cpu(described):
            layers = _read_into_stack(folder, config, ranges, mesh)
        else:
            read_parts = (Part(first, end, read(first, end)) for first, end in ranges)
            layers = gathered(read_parts, config.num_layers, device_bytes(rest), limit)
    if dtype is not None:
        config = config.replace(param_dtype=array_dtype(dtype), compute_dtype=dtype)
    params = GLMParams(layers=layers, **rest)
    if adapter is not None:
        chosen, pairs = load_adapter(adapter, config, model_identity(Path(path), config), mesh)
        pairs = glm_params.cast_params(pairs, config.activation_dtype)
        params = adapters.attach(params, pairs, chosen.scale)
    return config, params


def _is_on_cpu(described: GLMParams) -> bool:
    sharding = described.word_embeddings.sharding
    return next(iter(sharding.device_set)).platform == "cpu"


def _read_into_stack(
    folder: Path, config: GLMConfig, ranges: list[tuple[int, int]], mesh: Mesh | None
) -> LayerParams:
    """All layers as they are stored, each part read to its place in the stack."""
    stack = HostStack(config.num_layers, False)
    for first, end in ranges:
        name = parameter_files.layers_part(first, end)
        metadata = parameter_files.part_metadata(folder, name)
        target = _abstract_layers(metadata, config, end - first, mesh)
        # One after another: they share the disk, and buffers that are had again.
        parameter_files.read_part_into(folder, name, target, stack.room(target, first), metadata)
    return stack.finish()


def restore_layers(
    folder: Path, config: GLMConfig, first: int, end: int, mesh: Mesh | None = None
) -> LayerParams:
    """A part's layers, stacked, as they are stored.

    Args:
      folder: the model folder's `PARAMS_FOLDER`.
    """
    name = parameter_files.layers_part(first, end)
    metadata = parameter_files.part_metadata(folder, name)
    target = _abstract_layers(metadata, config, end - first, mesh)
    layers: LayerParams = parameter_files.read_part(folder, name, target, metadata)
    return layers


def _quantize_restored(layers: LayerParams, scheme: Scheme, path: Any) -> LayerParams:
    kernel = layers.query_key_value.kernel
    if not isinstance(kernel, QuantizedArray):
        return glm_params.quantize_layers(layers, scheme)
    is_other = (
        kernel.bits != scheme.bits
        or scheme.group_size not in (None, kernel.group_size)
        or (scheme.zero_point and kernel.zero_points is None)
    )
    if is_other:
        raise CheckpointError(
            f"{path} is quantised to int{kernel.bits} already, {kernel.group_size} inputs a "
            "group, and cannot become something else: quantise the float model"
        )
    return layers


def _abstract(config: GLMConfig, mesh: Mesh | None) -> GLMParams:
    tree = glm_params.abstract(config, mesh)
    placed: GLMParams = parameter_files.on_one_device(tree) if mesh is None else tree
    return placed


def _abstract_layers(
    metadata: Any, config: GLMConfig, count: int, mesh: Mesh | None
) -> LayerParams:
    """`count` layers as a part's metadata says they are stored: kernels quantised where the
    file's are."""
    specs: Any = glm_params.specs(config).layers
    some: Any = _abstract(config.replace(num_layers=count), mesh).layers
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def stored_linear(name: str, linear: LinearParams) -> LinearParams:
        stored = metadata.get(name, {}).get("kernel")
        if not isinstance(stored, dict):
            return linear
        values, scales = stored["values"], stored["scales"]
        shardings = (device, device)
        if mesh is not None:
            spec = getattr(specs, name).kernel
            shardings = glm_params.quantized_sharding(mesh, spec, values.shape, scales.shape)
        describe = lambda x, i: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[i])
        zero_points = stored.get("zero_points")
        kernel = QuantizedArray(
            values=describe(values, 0),
            scales=describe(scales, 1),
            bits=8 * values.shape[1] // linear.kernel.shape[1],
            contraction_axis=glm_params.contraction_axis(values),
            zero_points=None if zero_points is None else describe(zero_points, 1),
            axes=KERNEL_AXES[name],
        )
        return LinearParams(kernel=kernel, bias=linear.bias)

    return glm_params.map_layer_linears(stored_linear, some)
