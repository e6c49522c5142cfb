"""Adapters on disk: `adapter.json` and their arrays in Orbax, without the model.

`adapter.json` identifies the model that they were trained on, in any precision; every other model
refuses them.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from glm_jax import files, processes
from glm_jax.checkpoints import parameter_files
from glm_jax.checkpoints.checksums import (
    CHECKSUMS_FILE,
    DamageError,
    checked_files,
    write_checksums,
)
from glm_jax.checkpoints.folder_kinds import is_model
from glm_jax.checkpoints.parameter_files import PARAMS_FOLDER, CheckpointError
from glm_jax.config import GLMConfig
from glm_jax.model import adapters as model_adapters
from glm_jax.model import params as glm_params
from glm_jax.model.adapters import AdapterConfig
from glm_jax.model.params import Adapters, LayerNormParams

ADAPTER_FILE = "adapter.json"
_PART = "adapter"
_SHAPE = ("num_layers", "hidden_size", "inner_hidden_size", "num_heads")


def model_identity(folder: Path, config: GLMConfig) -> dict[str, Any]:
    """Identify a model in any precision: its shape, and a digest of its final layernorm, which
    quantising does not change.

    Args:
      folder: the model folder.
    """
    params = folder.absolute() / PARAMS_FOLDER
    metadata = parameter_files.part_metadata(params, parameter_files.EMBEDDING)
    norm = {"final_layernorm": metadata["final_layernorm"]}
    target = parameter_files.on_one_device(norm, jax.local_devices()[0])
    read = parameter_files.read_part(params, parameter_files.EMBEDDING, target, metadata)
    return identity_of(config, LayerNormParams(**read["final_layernorm"]))


def identity_of(config: GLMConfig, final_layernorm: LayerNormParams) -> dict[str, Any]:
    """`model_identity` of a model in memory, in the dtype that it is stored in."""
    digest = hashlib.sha256()
    for array in (final_layernorm.scale, final_layernorm.bias):
        digest.update(np.asarray(array).astype(np.float32).tobytes())
    shape: dict[str, Any] = {name: getattr(config, name) for name in _SHAPE}
    return shape | {"final_layernorm": digest.hexdigest()}


def save_adapter(
    path: str | os.PathLike[str],
    adapter: AdapterConfig,
    adapters: Adapters,
    identity: dict[str, Any],
) -> None:
    """Write a folder of adapters; of several processes all call this.

    Args:
      identity: of the model that they belong to; see `model_identity`.

    Raises:
      OutputError: the folder holds something already, or cannot be written.
    """
    with files.whole_folder(path) as partial:
        parameter_files.write_part(partial, _PART, adapters)
        if processes.is_first():
            about = dataclasses.asdict(adapter) | {"model": identity}
            files.write_text(partial / ADAPTER_FILE, json.dumps(about, indent=2) + "\n")
            written = (partial / ADAPTER_FILE, partial / _PART / CHECKSUMS_FILE)
            write_checksums(partial, written, {})


def check_adapter(path: str | os.PathLike[str]) -> None:
    """Read all of a folder of adapters, which compares it with its checksums.

    Raises:
      DamageError: a file or an array is not what was written.
    """
    folder = Path(path).absolute()
    with parameter_files.readable(folder):
        checked_files(folder)
    parameter_files.check_parts(folder)


def load_adapter(
    path: str | os.PathLike[str], config: GLMConfig, identity: dict[str, Any], mesh: Mesh | None
) -> tuple[AdapterConfig, Adapters]:
    """Read what `save_adapter` wrote, float32, layers stacked.

    Args:
      identity: of the model that they are to be attached to.
      mesh: where they go, one device by default.

    Raises:
      CheckpointError: there are none, or they belong to another model.
      DamageError: a file or an array is not what was written.
    """
    folder = Path(path).absolute()
    file = folder / ADAPTER_FILE
    about = files.read_json(file, CheckpointError, lambda: _no_adapters(path))
    with parameter_files.readable(folder):
        checked_files(folder)
    try:
        of_model = dict(about.pop("model"))
        adapter = AdapterConfig.from_dict(about)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: {error!r}; save the adapters again") from error
    if of_model != identity:
        differs = next((n for n, v in identity.items() if of_model.get(n) != v), "model")
        raise CheckpointError(
            f"{path} belongs to another model than this one ({differs} differs): attach it to the "
            "model that it was trained on"
        )
    described = glm_params.abstract_of(model_adapters.specs(config, adapter), mesh)
    described = parameter_files.on_mesh_or_one_device(described, mesh)
    metadata = parameter_files.part_metadata(folder, _PART)
    adapters: Adapters = parameter_files.read_part(folder, _PART, described, metadata)
    return adapter, adapters


def load_adapters(
    paths: Mapping[str, str | os.PathLike[str]],
    config: GLMConfig,
    identity: dict[str, Any],
    mesh: Mesh | None,
) -> list[tuple[AdapterConfig, Adapters]]:
    """Read several adapters by `load_adapter`, in the order of their names.

    Raises:
      CheckpointError, DamageError: as `load_adapter`, with the adapter's name; or an adapter with
        numbers that are not finite, which would spoil the answers of all others.
    """
    loaded = []
    for name, path in paths.items():
        try:
            adapter, adapters = load_adapter(path, config, identity, mesh)
            if not _is_finite(adapters, jnp.float32(adapter.scale), config.activation_dtype):
                raise CheckpointError(
                    f"{path}: numbers that are NaN or infinite in {config.activation_dtype}: "
                    "leave it out, or train it again"
                )
        except (CheckpointError, DamageError) as error:
            raise type(error)(f"adapter {name}: {error}") from error
        loaded.append((adapter, adapters))
    return loaded


@functools.partial(jax.jit, static_argnames="dtype")
def _is_finite(adapters: Adapters, scale: jax.Array, dtype: str) -> jax.Array:
    arrays = [x for pair in adapters.pairs.values() for x in (pair.down, scale * pair.up)]
    return jnp.array([jnp.isfinite(x.astype(dtype)).all() for x in arrays]).all()


def _no_adapters(path: str | os.PathLike[str]) -> str:
    inner = Path(path) / "adapter"
    give = "the folder `adapter` of a fine-tuning run's workdir"
    if (inner / ADAPTER_FILE).is_file():
        give = f"{inner}, of this fine-tuning run"
    what = ", it is a model folder" if is_model(Path(path)) else ""
    return f"{path} holds no adapters ({ADAPTER_FILE} is missing{what}): give {give}"
