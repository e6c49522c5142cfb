"""Parameters on disk as parts, each an Orbax checkpoint of its own.

`embedding` holds the word embedding and the final layernorm; `layers_00000_00070` holds
the layers from the first number up to the second, stacked. A converter writes each layer as
a part: its memory then stays at a layer, and a part that exists is whole.
"""

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import serialization
from jax.sharding import Mesh

from glm_jax import files, processes
from glm_jax.checkpoints.array_reader import (
    array_name,
    described_arrays,
    empty_buffers,
    open_arrays,
    placed,
    read_into,
    stored_chunks,
)
from glm_jax.checkpoints.checksums import (
    CHECKSUMS_FILE,
    array_checksums,
    checked_files,
    write_checksums,
)
from glm_jax.errors import UserError
from glm_jax.model.params import GLMParams

PARAMS_FOLDER = "params"  # of a model folder
EMBEDDING = "embedding"
_LAYERS = re.compile(r"layers_(\d{5})_(\d{5})")
# Chunks are read at the same time, each by a thread.
_CHUNK_BYTES = 16 << 20
_OVERHEAD_BYTES = 1 << 20  # files around the arrays, and disks' blocks


class CheckpointError(UserError):
    """A folder that holds no complete model; the message says what is missing where."""


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn the system's errors of reading a folder or file into CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{error.filename or path}: {error.strerror or error}") from error


def on_one_device(tree: Any, device: jax.Device | None = None) -> Any:
    """Describe arrays on one device, the first by default."""
    sharding = jax.sharding.SingleDeviceSharding(device or jax.devices()[0])
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return jax.tree.map(place, tree)


def on_mesh_or_one_device(tree: Any, mesh: Mesh | None) -> Any:
    """Return described arrays as they are if they are described on a mesh, else on one device."""
    return on_one_device(tree) if mesh is None else tree


def layers_part(first: int, end: int) -> str:
    return f"layers_{first:05d}_{end:05d}"


def embedding_tree(params: GLMParams) -> dict[str, Any]:
    """Return the tree of the part `EMBEDDING`."""
    return {
        "word_embeddings": params.word_embeddings,
        "final_layernorm": params.final_layernorm,
    }


def write_part(folder: Path, name: str, tree: Any) -> None:
    """Write a part with its checksums; of several processes that share arrays each its own
    shards.

    Arrays are stored in chunks within their shards, uncompressed: weights hardly shrink,
    and compression would take longer than the disk.
    """
    state = serialization.to_state_dict(tree)
    options = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), state)
    handler = ocp.PyTreeCheckpointHandler(use_compression=False)
    partial = folder / f"{name}.partial"
    _check_room(folder, state)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(partial, state, save_args=options, force=True)
    checksums = processes.gather(_checksums(partial, state))
    if processes.is_first():
        write_checksums(partial, partial.rglob("*"), checksums)
        files.put_in_place(partial, folder / name)
    processes.wait(f"the part {name} is whole")


def _check_room(folder: Path, state: dict[str, Any]) -> None:
    """Refuse before Orbax does, whose threads each print a trace when a disk is full."""
    folder.mkdir(parents=True, exist_ok=True)
    needed = sum(array.nbytes for array in jax.tree.leaves(state)) + _OVERHEAD_BYTES
    if missing := files.missing_room(folder, needed):
        raise files.OutputError(f"output {folder} cannot be written: {missing}")


def _checksums(folder: Path, state: dict[str, Any]) -> dict[str, int]:
    """Checksums of the chunks that this process wrote, from the arrays in memory."""
    arrays = {array_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(state)}
    found: dict[str, int] = {}
    for (name, array), store in zip(arrays.items(), open_arrays(folder, list(arrays)), strict=True):
        found |= array_checksums(name, array, stored_chunks(store))
    return found


def remove_unfinished(folder: Path, name: str) -> None:
    """Remove a part that a killed process left unfinished, or that is damaged."""
    for path in (folder / name, *folder.glob(f"{name}.*")):
        shutil.rmtree(path, ignore_errors=True)


def layer_ranges(folder: Path, num_layers: int) -> list[tuple[int, int]]:
    """Return the parts of layers, [first, end) each, in order.

    Raises:
      CheckpointError: layers that are missing, or there twice.
    """
    with readable(folder):
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    matches = filter(None, map(_LAYERS.fullmatch, sorted(names)))
    ranges = [(int(match[1]), int(match[2])) for match in matches]
    reached = 0
    for first, end in ranges:
        if first != reached:
            break
        reached = end
    if reached != num_layers or ranges[-1][1] != num_layers or EMBEDDING not in names:
        what = "it holds parts of other layers"
        if EMBEDDING not in names:
            what = f"{EMBEDDING} is missing"
        elif reached < num_layers:
            what = f"no part begins with layer {reached}"
        raise CheckpointError(
            f"{folder} holds no complete parameters of {num_layers} layers ({what}): convert or "
            "export again"
        )
    return ranges


def part_metadata(folder: Path, name: str) -> Any:
    """Return the tree of what a part's arrays are, without reading them.

    Raises:
      DamageError: a file of the part is missing or damaged.
      CheckpointError: it is no checkpoint, or cannot be read.
    """
    with readable(folder / name):
        checked_files(folder / name)
        return described_arrays(folder / name)


def read_part(folder: Path, name: str, target: Any, metadata: Any) -> Any:
    """Return the arrays of a part, as `target` describes them; each device reads its own slices.

    Args:
      target: `jax.ShapeDtypeStruct` leaves with shardings.
      metadata: the part's.

    Raises:
      CheckpointError: an array is missing, or has another shape.
    """
    _check_shapes(
        folder / name, target, metadata
    )  # before memory of its config's sizes is allocated
    buffers = jax.tree.map(empty_buffers, target)
    read_part_into(folder, name, target, buffers, metadata)
    return jax.tree.map(lambda x, b: placed(x, b, x.shape, None), target, buffers)


def read_whole_part(folder: Path, name: str) -> Any:
    """Return the arrays of a part as they are stored, in a CPU's memory.

    Raises:
      DamageError: one is not what was written.
      CheckpointError: one cannot be read.
    """
    metadata = part_metadata(folder, name)
    target = on_one_device(metadata, jax.local_devices(backend="cpu")[0])
    return read_part(folder, name, target, metadata)


def check_parts(folder: Path) -> None:
    """Read the parts in `folder`, one at a time, which compares them with their checksums.

    Raises:
      DamageError, CheckpointError: see `read_whole_part`.
    """
    for file in sorted(folder.glob(f"*/{CHECKSUMS_FILE}")):
        read_whole_part(folder, file.parent.name)


def read_part_into(folder: Path, name: str, target: Any, buffers: Any, metadata: Any) -> None:
    """`read_part` into the caller's memory.

    Args:
      buffers: a tree like `target`, of `Buffers`.
      metadata: the part's.
    """
    _check_shapes(folder / name, target, metadata)
    into = serialization.to_state_dict(buffers)
    with readable(folder / name):
        checksums = checked_files(folder / name)
        read_into(folder / name, serialization.to_state_dict(target), into, checksums)


def _check_shapes(part: Path, target: Any, metadata: Any) -> None:
    expected = serialization.to_state_dict(target)
    found = dict(jax.tree_util.tree_leaves_with_path(metadata))
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        label = array_name(path)
        if path not in found:
            raise CheckpointError(f"{part}: the parameter {label} is missing")
        if tuple(found[path].shape) != tuple(leaf.shape):
            raise CheckpointError(
                f"{part}: {label} is {tuple(found[path].shape)}, its config says "
                f"{tuple(leaf.shape)}"
            )
