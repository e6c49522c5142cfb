"""Parameters on disk as parts, each an Orbax checkpoint of its own.

`embedding` holds the word embedding and the final layernorm; `layers_00000_00070` holds
the layers from the first number up to the second, stacked. A converter writes each layer as
a part: its memory then stays at a layer, and a part that is there is whole.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import serialization

from glm_jax.errors import UserError
from glm_jax.model.params import GLMParams
from glm_jax.model.reading import empty_buffers, placed, read_into

PARAMS_FOLDER = "params"  # of a model folder
EMBEDDING = "embedding"
_LAYERS = re.compile(r"layers_(\d{5})_(\d{5})")
# A reader copies each chunk once more, to where it belongs: cheap while it is in the processor's
# cache and its buffer is had again, twice the time of the whole read where a chunk is an array.
_CHUNK_BYTES = 16 << 20


class CheckpointError(UserError):
    """A folder that holds no complete model; the message says what is missing where."""


def on_one_device(tree: Any, device: jax.Device | None = None) -> Any:
    """Described arrays as they lie on a device, the first by default."""
    sharding = jax.sharding.SingleDeviceSharding(device or jax.devices()[0])
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return jax.tree.map(place, tree)


def layers_part(first: int, end: int) -> str:
    return f"layers_{first:05d}_{end:05d}"


def embedding_tree(params: GLMParams) -> dict[str, Any]:
    """What the part `EMBEDDING` holds."""
    return {
        "word_embeddings": params.word_embeddings,
        "final_layernorm": params.final_layernorm,
    }


def is_whole(folder: Path, name: str) -> bool:
    """Whether a part is there; Orbax renames a part to its name when it is whole."""
    return (folder / name).is_dir()


def write_part(folder: Path, name: str, tree: Any) -> None:
    """Writes a part; of several processes that share arrays each its own shards.

    Arrays are stored in chunks within their shards, uncompressed: weights hardly shrink,
    and compression would take longer than the disk.
    """
    state = serialization.to_state_dict(tree)
    options = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), state)
    handler = ocp.PyTreeCheckpointHandler(use_compression=False)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder / name, state, save_args=options)


def remove_unfinished(folder: Path, name: str) -> None:
    """Removes what a process that was killed left of a part."""
    for path in folder.glob(f"{name}.*"):
        shutil.rmtree(path, ignore_errors=True)


def layer_ranges(folder: Path, num_layers: int) -> list[tuple[int, int]]:
    """The parts of layers, [first, end) each, in order.

    Raises:
      CheckpointError: layers that are missing, or there twice.
    """
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    matches = filter(None, map(_LAYERS.fullmatch, sorted(names)))
    ranges = [(int(match[1]), int(match[2])) for match in matches]
    reached = 0
    for first, end in ranges:
        if first != reached:
            break
        reached = end
    if reached != num_layers or ranges[-1][1] != num_layers or EMBEDDING not in names:
        raise CheckpointError(
            f"{folder} holds no complete parameters of {num_layers} layers: convert or export again"
        )
    return ranges


def part_metadata(folder: Path, name: str) -> Any:
    """The tree of what a part's arrays are, without reading them."""
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(folder / name).item_metadata
    if metadata is None:
        raise CheckpointError(f"{folder / name} is no whole checkpoint: convert or export again")
    return metadata.tree


def read_part(folder: Path, name: str, target: Any, metadata: Any) -> Any:
    """The arrays of a part, as `target` describes them; each device reads its own slices.

    Args:
      target: `jax.ShapeDtypeStruct` leaves with shardings.
      metadata: the part's.

    Raises:
      CheckpointError: an array is missing, or has another shape.
    """
    buffers = jax.tree.map(empty_buffers, target)
    read_part_into(folder, name, target, buffers, metadata)
    return jax.tree.map(lambda x, b: placed(x, b, x.shape, None), target, buffers)


def read_part_into(folder: Path, name: str, target: Any, buffers: Any, metadata: Any) -> None:
    """`read_part` to a place of the caller's.

    Args:
      buffers: a tree like `target`, of `Buffers`.
      metadata: the part's.
    """
    expected = serialization.to_state_dict(target)
    found = dict(jax.tree_util.tree_leaves_with_path(metadata))
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        label = jax.tree_util.keystr(path, simple=True, separator=".")
        if path not in found:
            raise CheckpointError(f"{folder / name}: the parameter {label} is missing")
        if tuple(found[path].shape) != tuple(leaf.shape):
            raise CheckpointError(
                f"{folder / name}: {label} is {tuple(found[path].shape)}, its config says "
                f"{tuple(leaf.shape)}"
            )
    read_into(folder / name, expected, serialization.to_state_dict(buffers))
