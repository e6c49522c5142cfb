"""A model on disk: `config.json`, the parameters in Orbax, the tokenizer beside them.

A folder is written under another name and renamed when whole, so that a path either
holds a complete model or nothing.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import serialization
from jax.sharding import Mesh

from glm_jax import config as glm_config
from glm_jax import processes
from glm_jax.config import ConfigError, GLMConfig
from glm_jax.errors import UserError
from glm_jax.model import params as glm_params
from glm_jax.model.params import KERNEL_AXES, GLMParams, LinearParams
from glm_jax.quantization import QuantizedArray, Scheme

CONFIG_FILE = "config.json"
PARAMS_FOLDER = "params"


class CheckpointError(UserError):
    """A folder that holds no complete model; the message says what is missing where."""


def save_model(
    path: str | os.PathLike[str],
    config: GLMConfig,
    params: GLMParams,
    extra_files: tuple[Path, ...] = (),
) -> None:
    """Writes a model folder; of several processes each its own parts, all calling this.

    Args:
      path: a folder that does not exist yet, or is empty.
      params: float or quantised, layers stacked; arrays of jax or numpy.
      extra_files: copied into the folder (a tokenizer's files).

    Raises:
      CheckpointError: the folder holds something already.
    """
    target = Path(path).absolute()
    refuse_non_empty(target)
    partial = target.with_name(target.name + ".partial")
    if processes.is_first():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    processes.wait("a place for the model")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(partial / PARAMS_FOLDER, serialization.to_state_dict(params))
    if processes.is_first():
        for file in extra_files:
            shutil.copy2(file, partial / file.name)
        (partial / CONFIG_FILE).write_text(config.to_json(), encoding="utf-8")
        if target.exists():
            target.rmdir()
        partial.rename(target)
    processes.wait("the model is whole")


def refuse_non_empty(path: Path) -> None:
    """Raises CheckpointError where writing to `path` would mix with what is there."""
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise CheckpointError(f"output {path} is not empty: remove it or name another folder")


def load_config(path: str | os.PathLike[str]) -> GLMConfig:
    """The config of a model folder.

    Raises:
      CheckpointError: there is none, or it cannot be read.
    """
    file = Path(path) / CONFIG_FILE
    try:
        return glm_config.GLMConfig.from_json(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{path} holds no model ({CONFIG_FILE} is missing): give a folder that a converter, "
            "a training run's export or save_model wrote"
        ) from error
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error


def restore(
    path: str | os.PathLike[str],
    mesh: Mesh | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
) -> tuple[GLMConfig, GLMParams]:
    """Reads a model onto a mesh; each device reads its own slices.

    Args:
      path: a model folder.
      mesh: where the parameters go, one device by default.
      dtype: "float32", "bfloat16" or "float16" for parameters and computation; as stored
        by default.
      quantization: quantises a float model after reading: "int8", "int4", or with options
        such as "int4,group=128,zero_point" (`Scheme.parse`).

    Returns:
      The config, and the parameters with layers stacked.

    Raises:
      CheckpointError: no complete model there, or one quantised in another way.
      QuantizationError: `quantization` says nothing known, or groups do not divide.
      MeshError: the shapes do not divide over the mesh.
    """
    scheme = None if quantization is None else Scheme.parse(quantization)
    config = load_config(path)
    stored = Path(path).absolute() / PARAMS_FOLDER
    with ocp.StandardCheckpointer() as checkpointer:
        item_metadata = checkpointer.metadata(stored).item_metadata if stored.is_dir() else None
        if item_metadata is None:
            raise CheckpointError(f"{stored} holds no complete parameters: convert or export again")
        metadata = item_metadata.tree
        target = _abstract_like(config, metadata, mesh, path)
        state = checkpointer.restore(stored, serialization.to_state_dict(target))
    params: GLMParams = serialization.from_state_dict(target, state)
    if scheme is not None:
        params = _quantize_restored(params, scheme, path)
    if dtype is not None:
        config = config.replace(param_dtype=dtype, compute_dtype=dtype)
        params = glm_params.cast_params(params, dtype)
    return config, params


def _quantize_restored(params: GLMParams, scheme: Scheme, path: Any) -> GLMParams:
    kernel = params.layers.query_key_value.kernel  # type: ignore[union-attr]
    if not isinstance(kernel, QuantizedArray):
        return glm_params.quantize_params(params, scheme)
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
    return params


def _abstract_like(config: GLMConfig, metadata: Any, mesh: Mesh | None, path: Any) -> GLMParams:
    """The tree to restore: shapes of the config, kernels quantised where the file's are."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    specs = glm_params.specs(config)
    float_tree = glm_params.abstract(config, mesh)
    if mesh is None:
        float_tree = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), float_tree
        )

    def quantized(name: str, linear: LinearParams) -> LinearParams:
        stored = metadata["layers"][name]["kernel"]
        if not isinstance(stored, dict):
            return linear
        values, scales = stored["values"], stored["scales"]
        shardings = (device, device)
        if mesh is not None:
            spec = getattr(specs.layers, name).kernel
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

    target = glm_params.map_linears(quantized, float_tree)
    expected = jax.tree_util.tree_leaves_with_path(serialization.to_state_dict(target))
    found = dict(jax.tree_util.tree_leaves_with_path(metadata))
    for key, leaf in expected:
        name = jax.tree_util.keystr(key, simple=True, separator=".")
        if key not in found:
            raise CheckpointError(f"{path}: the parameter {name} is missing")
        if tuple(found[key].shape) != tuple(leaf.shape):
            raise CheckpointError(
                f"{path}: {name} is {tuple(found[key].shape)}, its config says {leaf.shape}"
            )
    return target
