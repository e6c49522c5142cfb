"""Conversion of a synthetic 12 GB checkpoint, beside a plain copy of its bytes."""

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from convert import sat_layout
from convert.torch_writer import TorchWriter
from glm_jax.config import GLMConfig
from launch.suites.case import Case

SHARDS, PART_BYTES = 8, 1 << 30
_SETTLING = 10.0  # seconds


def config(num_layers: int) -> GLMConfig:
    """Config of a 12.4 GB model: 28 layers of 0.4 GB and an embedding of 1.2 GB."""
    return GLMConfig(
        num_layers=num_layers,
        hidden_size=4096,
        inner_hidden_size=10880,
        num_heads=32,
        vocab_size=150528,
    )


class PartWriter(io.RawIOBase):
    """A writable file that splits what it gets into NAME.part_00, NAME.part_01, ..."""

    def __init__(self, path: Path, part_bytes: int):
        self._path, self._part_bytes, self._written = path, part_bytes, 0
        self._part = self._open(0)

    def _open(self, number: int) -> io.BufferedWriter:
        return self._path.with_name(f"{self._path.name}.part_{number:02d}").open("wb")

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        view, size = memoryview(data), len(data)
        while view:
            room = self._part_bytes - self._written % self._part_bytes
            count = self._part.write(view[:room])
            self._written += count
            view = view[count:]
            if self._written % self._part_bytes == 0:
                self._part.close()
                self._part = self._open(self._written // self._part_bytes)
        return size

    def close(self) -> None:
        self._part.close()
        super().close()


def make_parts(folder: Path, model: GLMConfig, shards: int, part_bytes: int) -> None:
    """Write a checkpoint of random values as the parts of a tar archive."""
    rng = np.random.default_rng(0)
    block = rng.standard_normal(1 << 20, np.float32).astype(np.float16) / 50
    shapes, whole = (sat_layout.shard_shapes(model, count) for count in (shards, 1))
    shapes |= dict.fromkeys(sat_layout.frequency_names(model), (model.head_dim // 2,))
    described: dict[str, tuple[tuple[int, ...], Any]] = {
        name: (shape, np.float16) for name, shape in shapes.items()
    }
    folder.mkdir(parents=True)
    archive: Any = io.BufferedWriter(
        PartWriter(folder / "made-sat.tar", part_bytes),
        1 << 22,
    )
    with tarfile.open(fileobj=archive, mode="w|", bufsize=1 << 22) as tar:
        latest = tarfile.TarInfo("made-sat/latest")
        latest.size = 5
        tar.addfile(latest, io.BytesIO(b"49300"))
        for rank in range(shards):
            name = f"mp_rank_{rank:02d}_model_states.pt"
            with TorchWriter(folder / name, described) as writer:
                for index, (tensor, shape) in enumerate(shapes.items()):
                    size = int(np.prod(shape))
                    # What is not split is the same in all shards.
                    is_split = shape != whole.get(tensor, shape)
                    shifted = np.roll(block, 1000 * rank * is_split + index)
                    writer.write(tensor, np.resize(shifted, size).reshape(shape))
            tar.add(folder / name, f"made-sat/49300/{name}")
            (folder / name).unlink()
    archive.close()


def convert_suite(num_layers: int = 28) -> Iterator[tuple[str, dict[str, Case]]]:
    """Conversion from downloaded parts to a model folder, and `cp` of the parts. `cp` is followed
    by `sync`, since the conversion waits for the disk too."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as temporary:
        folder = Path(temporary)
        source = folder / "downloads"
        make_parts(source, config(num_layers), SHARDS, PART_BYTES)
        size = sum(file.stat().st_size for file in source.iterdir())
        peaks: list[int] = []

        def prepare() -> None:
            for name in ("converted", "copied"):
                shutil.rmtree(folder / name, ignore_errors=True)
            os.sync()
            # A virtual machine returns freed memory to its host within seconds. `cp` starts at once
            # and would still have that memory; a conversion starts slower and would not.
            time.sleep(_SETTLING)

        def convert() -> None:
            command = [sys.executable, "-m", "convert.sat_to_orbax"]
            flags = [f"--input={source}", f"--output={folder / 'converted'}"]
            with subprocess.Popen(
                [*command, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            ) as process:
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = status
            if status:
                raise RuntimeError("the conversion failed")
            peaks.append(usage.ru_maxrss * 1024)
            os.sync()

        def copy() -> None:
            subprocess.run(["cp", "-r", source, folder / "copied"], check=True)
            os.sync()

        cases = {
            "convert": Case(convert, prepare=prepare, is_long=True),
            "cp": Case(copy, prepare=prepare, is_long=True),
        }
        yield f"conversion of {size / 1e9:.1f} GB, {SHARDS} shards in tar parts", cases
        largest = 2 * config(num_layers).vocab_size * config(num_layers).hidden_size
        print(
            f"peak memory {max(peaks) / 2**30:.2f} GiB; three times the largest tensor and a GiB "
            f"are {3 * largest / 2**30 + 1:.2f}"
        )
