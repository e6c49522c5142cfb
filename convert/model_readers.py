"""Any form of a model, layer by layer: what the tools that compare, show and export read."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import ml_dtypes
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from convert import sat_layout
from convert.byte_source import FileBytes
from convert.errors import ConvertError
from convert.file_kinds import is_plain_name, known_kind
from convert.numbers import cast
from convert.plain_reading import PlainModel, WholeTensors
from convert.sat_reader import SatCheckpoint
from glm_jax.checkpoints import parameter_files
from glm_jax.checkpoints.checksums import CHECKSUMS_FILE, chunk_checksum, damaged
from glm_jax.checkpoints.folder_kinds import CONFIG_FILE
from glm_jax.checkpoints.model_folder import (
    check_files,
    load_config,
    read_config,
    restore_layers,
    stored_format,
)
from glm_jax.config import GLMConfig
from glm_jax.model.params import LayerNormParams, LayerParams

SAFETENSORS_INDEX = "model.safetensors.index.json"


class OpenModel(Protocol):
    """Attributes:
    kind: a description, which also says if there are no checksums.
    config: its architecture.
    bits: 8 or 4 if it is quantised, else None.
    """

    kind: str
    config: GLMConfig
    bits: int | None

    def embedding(self) -> np.ndarray:
        """Return [vocab, embed]."""

    def final_layernorm(self) -> LayerNormParams: ...

    def layers(self) -> Iterator[LayerParams]:
        """Yield the layers in order, as numpy arrays."""


def open_model(
    path: epath.PathLike, num_heads: int | None = None, allow_differing_copies: bool = False
) -> OpenModel:
    """Open a model folder, a folder of safetensors, or released shards in any form.

    Args:
      num_heads: for released shards that do not say it; None otherwise.
      allow_differing_copies: see `SatCheckpoint`.

    Raises:
      ConvertError, CheckpointError: it is none of them, or not whole.
    """
    folder = Path(path)
    if (folder / CONFIG_FILE).exists() and (folder / parameter_files.PARAMS_FOLDER).is_dir():
        return _Folder(folder)
    if (folder / SAFETENSORS_INDEX).exists():
        return _Safetensors(folder)
    return _Shards(path, num_heads, allow_differing_copies)


def open_plainly(
    path: epath.PathLike, num_heads: int | None = None, allow_differing_copies: bool = False
) -> OpenModel:
    """Open a model as `open_model` does, but read released tensors without the converter's code.

    An error of the converter then shows as a difference; see `plain_reading`.
    """
    model = open_model(path, num_heads, allow_differing_copies)
    return model.plain() if isinstance(model, _Shards) else model


class _Folder:
    def __init__(self, folder: Path):
        self.config = load_config(folder)
        check_files(folder)
        self._params = folder.absolute() / parameter_files.PARAMS_FOLDER
        self._ranges = parameter_files.layer_ranges(self._params, self.config.num_layers)
        self._stored = stored_format(folder)
        self.bits = self._stored.bits if self._stored.is_quantized else None
        self.kind = f"model folder, {self._stored.name}"
        self._norm: LayerNormParams | None = None

    def embedding(self) -> np.ndarray:
        rest = parameter_files.read_whole_part(self._params, parameter_files.EMBEDDING)
        # It is stored with the embedding, which would be read for it again.
        norm = rest["final_layernorm"]
        self._norm = LayerNormParams(np.asarray(norm["scale"]), np.asarray(norm["bias"]))
        return np.asarray(rest["word_embeddings"])

    def final_layernorm(self) -> LayerNormParams:
        if self._norm is None:
            self.embedding()
        assert self._norm is not None
        return self._norm

    def layers(self) -> Iterator[LayerParams]:
        for first, end in self._ranges:
            layers = restore_layers(self._params, self.config, self._stored, first, end)
            for i in range(end - first):
                yield jax.tree.map(lambda x, i=i: np.asarray(x[i]), layers)


class _Shards:
    def __init__(self, path: epath.PathLike, num_heads: int | None, allow_differing_copies: bool):
        self.checkpoint = SatCheckpoint(path, allow_differing_copies=allow_differing_copies)
        self.config = self.checkpoint.config(num_heads, 2048)
        self.checkpoint.check(self.config)
        self.bits = self.checkpoint.bits(self.config)
        count = len(self.checkpoint.shards)
        precision = f"int{self.bits}" if self.bits else self.config.param_dtype
        self.kind = f"released shards, {count} of them, {precision}"
        if count := self.checkpoint.cast_count(self.config):
            self.kind += f"; {count} tensors are not {self.config.param_dtype} as the embedding is"
        if self.checkpoint.differing_copies:
            of_them = "; ".join(self.checkpoint.differing_copies.values())
            self.kind += f"; the first shard's are taken where copies differ: {of_them}"

    def embedding(self) -> np.ndarray:
        return self.checkpoint.embedding(self.config)

    def final_layernorm(self) -> LayerNormParams:
        return self.checkpoint.final_layernorm()

    def layers(self) -> Iterator[LayerParams]:
        for i in range(self.config.num_layers):
            yield self.checkpoint.layer(self.config, i)

    def plain(self) -> OpenModel:
        whole = WholeTensors(self.checkpoint)
        return PlainModel(self.kind, self.config, self.bits, whole, whole.of_each_shard)


class _Safetensors(PlainModel):
    def __init__(self, folder: Path):
        self._folder, config = folder, read_config(folder)
        self._files = read_index(folder)
        # Other programs write none.
        has_checksums = (folder / CHECKSUMS_FILE).exists()
        self._checksums = check_files(folder) if has_checksums else None
        # Before shapes of layers are listed: a config can claim any number of them.
        if config.num_layers > len(self._files):
            raise ConvertError(
                f"{folder} holds {len(self._files)} tensors, its config says "
                f"{config.num_layers} layers: export it again"
            )
        self._shapes = sat_layout.shard_shapes(config, 1)
        unchecked = "" if has_checksums else ", without checksums"
        kind = f"safetensors, {config.param_dtype}{unchecked}"
        super().__init__(kind, config, None, self._tensor)

    def _tensor(self, name: str) -> np.ndarray:
        file = self._files.get(name)
        if file is None:
            raise ConvertError(f"{self._folder}: {name} is missing: export it again")
        with open_safetensors(self._folder / file) as tensors:
            shape = tuple(tensors.get_slice(name).get_shape())
            if shape != self._shapes[name]:
                raise ConvertError(
                    f"{self._folder / file}: {name} is {shape}, its config says "
                    f"{self._shapes[name]}: export it again"
                )
            values: np.ndarray = tensors.get_tensor(name)
        if self._checksums is not None and self._checksums.get(name) != chunk_checksum(values):
            raise damaged(f"{self._folder / file}: {name}", "it is not what was written")
        values = values.view(ml_dtypes.bfloat16) if values.dtype == np.dtype("V2") else values
        if values.dtype.kind in "iub":
            raise ConvertError(
                f"{self._folder / file}: {name} has {values.dtype}, no floats: export it again"
            )
        try:
            return cast(values, np.dtype(self.config.param_dtype))
        except ConvertError as error:
            raise ConvertError(f"{self._folder / file}: {name}: {error}") from None


def read_index(folder: Path) -> dict[str, str]:
    """Return the names of the files in `folder` that hold its tensors, by the tensors' names.

    Raises:
      ConvertError: it is no index, or names files in another folder.
    """
    path = folder / SAFETENSORS_INDEX
    try:
        files: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = set(files.values())
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        kind = known_kind(FileBytes(path), "json")
        kind = kind or f"is no index of safetensors ({error!r}): export it again"
        raise ConvertError(f"{path} {kind}") from error
    for name in names:
        if not isinstance(name, str) or not is_plain_name(name):
            raise ConvertError(f"{path}: {name!r} is no name of a file beside it: export it again")
    return files


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Open a file of safetensors.

    Raises:
      ConvertError: it is missing, damaged or of another format.
    """
    try:
        with safe_open(path, "np") as tensors:
            yield tensors
    except FileNotFoundError as error:
        raise ConvertError(f"{path} is missing: export or fetch it again") from error
    except (OSError, SafetensorError) as error:
        kind = known_kind(FileBytes(path), "safetensors")
        kind = kind or f"is damaged or no safetensors file ({error}): export or fetch it again"
        raise ConvertError(f"{path} {kind}") from error
