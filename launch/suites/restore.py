"""A model of 4 GB read from its folder, beside a plain read of the same files."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import jax

from convert.conversion import Options, convert_shards
from glm_jax.checkpoints.model_folder import restore
from launch.suites.case import Case
from launch.suites.convert import PART_BYTES, SHARDS, config, make_parts

_LAYERS = 8  # of 0.4 GB, and an embedding of 1.2 GB
_READERS = 4


def restore_suite() -> Iterator[tuple[str, dict[str, Case]]]:
    """Both read into fresh memory, with the files in the page cache and from the disk."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as temporary:
        source, folder = Path(temporary) / "downloads", Path(temporary) / "model"
        make_parts(source, config(_LAYERS), SHARDS, PART_BYTES)
        convert_shards(source, folder, Options())
        shutil.rmtree(source)
        os.sync()  # else the disk is still writing while the first case runs
        files = [path for path in folder.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)

        def read() -> None:
            with futures.ThreadPoolExecutor(_READERS) as pool:
                assert sum(map(len, pool.map(Path.read_bytes, files))) == size

        load: Callable[[], Any] = lambda: jax.block_until_ready(restore(folder))
        for state, prepare in (("cached", lambda: None), ("on disk", lambda: _forget(files))):
            cases = {
                name: Case(run, prepare=prepare, is_long=state == "on disk")
                for name, run in (("read", read), ("restore", load))
            }
            yield f"{size / 1e9:.1f} GB, {state}", cases


def _forget(files: list[Path]) -> None:
    """Drop files from the page cache."""
    os.sync()
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
