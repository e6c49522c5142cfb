"""Writes a model as safetensors, in files of some gigabytes with an index.

python -m convert.orbax_to_safetensors --input=DIR --output=DIR

Names and [outputs, inputs] are the released layout's, whole and not split.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from safetensors.numpy import save_file

from convert.errors import ConvertError
from convert.model_readers import SAFETENSORS_INDEX, open_model
from convert.sat_writer import released_tensors
from glm_jax import cli
from glm_jax.checkpoints.checksums import chunk_checksum
from glm_jax.checkpoints.model_folder import describe_model
from glm_jax.files import whole_folder, write_text
from glm_jax.quantization import WeightFormat

FLAGS = flags.FLAGS


class _Files:
    """Collects tensors into files of up to `max_bytes`, or of one larger tensor."""

    def __init__(self, folder: Path, max_bytes: int):
        self._folder, self._max_bytes = folder, max_bytes
        self._waiting: dict[str, np.ndarray] = {}
        self._names: list[list[str]] = []
        self.checksums: dict[str, int] = {}
        self.bytes = 0

    def add(self, name: str, tensor: Any) -> None:
        array = np.ascontiguousarray(tensor)
        if self._waiting and self._size() + array.nbytes > self._max_bytes:
            self._write()
        self._waiting[name] = array
        self.checksums[name] = chunk_checksum(array)
        self.bytes += array.nbytes

    def _size(self) -> int:
        return sum(array.nbytes for array in self._waiting.values())

    def _write(self) -> None:
        save_file(self._waiting, self._folder / f"{len(self._names)}.partial")
        self._names.append(list(self._waiting))
        self._waiting = {}

    def close(self) -> None:
        """Write the rest and the index; the names of files contain their number."""
        self._write()
        count = len(self._names)
        files: dict[str, str] = {}
        for i, names in enumerate(self._names):
            file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            (self._folder / f"{i}.partial").rename(self._folder / file)
            files |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self.bytes}, "weight_map": files}
        write_text(self._folder / SAFETENSORS_INDEX, json.dumps(index, indent=1))


def export(source: Path, output: Path, max_bytes: int) -> None:
    """Write a model as safetensors; the folder is named OUTPUT.partial until it is whole.

    Args:
      max_bytes: of a file.

    Raises:
      ConvertError: a quantised model, for whose integers this format has no convention.
      CheckpointError: no model at `source`.
      OutputError: the output folder is not empty, or cannot be written.
    """
    with whole_folder(output) as partial:
        model, files = open_model(source), _Files(partial, max_bytes)
        if model.bits is not None:
            raise ConvertError(f"{source} is quantised: export the float model")
        for name, [tensor] in released_tensors(model, 1, np.asarray):
            files.add(name, tensor)
        files.close()
        stored = WeightFormat(model.config.param_dtype)
        describe_model(partial, model.config, stored, checksums=files.checksums)
    print(f"wrote {output}: {files.bytes:,} bytes")


def main() -> None:
    export(Path(FLAGS.input), Path(FLAGS.output), int(FLAGS.file_gigabytes * 1e9))


if __name__ == "__main__":
    flags.DEFINE_string(
        "input", None, "model to write: a model folder or released shards", required=True
    )
    flags.DEFINE_string("output", None, "folder to write; must be missing or empty", required=True)
    flags.DEFINE_float("file_gigabytes", 5.0, "maximum size of a file", lower_bound=1e-6)
    flags.register_validator("file_gigabytes", math.isfinite, "a number")
    cli.run(main)
