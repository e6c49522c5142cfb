"""Shows what a checkpoint holds, and which meshes fit it.

python -m convert.inspect PATH
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from absl import flags

from convert import sat_layout
from convert.model_readers import SAFETENSORS_INDEX, open_safetensors, read_index
from convert.sat_reader import SatCheckpoint
from glm_jax import cli
from glm_jax.checkpoints import parameter_files
from glm_jax.checkpoints.folder_kinds import CONFIG_FILE
from glm_jax.checkpoints.model_folder import read_config
from glm_jax.config import GLMConfig
from glm_jax.model.params import parameter_count

FLAGS = flags.FLAGS
_DEGREES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96)
Row = tuple[str, tuple[int, ...], str]


def fitting_degrees(config: GLMConfig) -> list[int]:
    """Return the tensor-parallel degrees that divide all sizes split over the tensor axis."""
    sizes = (config.num_heads, config.inner_hidden_size, config.vocab_size)
    return [n for n in _DEGREES if not any(size % n for size in sizes)]


def _folder_rows(folder: Path, config: GLMConfig) -> Iterator[Row]:
    params = folder.absolute() / parameter_files.PARAMS_FOLDER
    ranges = parameter_files.layer_ranges(params, config.num_layers)
    for name in (parameter_files.EMBEDDING, *(parameter_files.layers_part(*r) for r in ranges)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            parameter_files.part_metadata(params, name)
        ):
            label = jax.tree_util.keystr(path, simple=True, separator=".")
            yield f"{name}.{label}", tuple(leaf.shape), str(leaf.dtype)


def _safetensors_rows(folder: Path) -> Iterator[Row]:
    for file in sorted(set(read_index(folder).values())):
        with open_safetensors(folder / file) as tensors:
            for name in list(tensors.keys()):
                part = tensors.get_slice(name)
                yield name, tuple(part.get_shape()), part.get_dtype()


def describe(path: str, num_heads: int | None) -> tuple[list[str], list[Row], GLMConfig | None]:
    """Return lines that describe a checkpoint, its arrays, and its config if it can be run."""
    folder = Path(path)
    if (folder / CONFIG_FILE).exists():
        config = read_config(folder)
        if (folder / SAFETENSORS_INDEX).exists():
            return [f"{path}: safetensors"], list(_safetensors_rows(folder)), config
        return [f"{path}: model folder"], list(_folder_rows(folder, config)), config
    checkpoint = SatCheckpoint(path)
    count = len(checkpoint.shards)
    rows = [
        (name, sat_layout.merged_shape(name, tensor.shape, count), str(tensor.dtype))
        for name, tensor in ((name, checkpoint.tensor(name)) for name in checkpoint.names)
    ]
    lines = [f"{path}: released shards, {count} of them; shapes are of the whole"]
    lines += [f"  {shard.name}: {shard.size:,} bytes" for shard in checkpoint.shards]
    if checkpoint.has_learned_positions:
        lines.append("learned block positions (GLM-10B, GLM-2B, GLM-large): cannot be run")
        return lines, rows, None
    return lines, rows, checkpoint.config(num_heads, 2048)


def main(paths: list[str]) -> None:
    lines, rows, config = describe(paths[0], FLAGS.num_heads)
    print("\n".join(lines))
    for name, shape, dtype in rows:
        print(f"  {name:<64} {list(shape)!s:<26} {dtype}")
    if rows:
        total: Any = sum(math.prod(shape) for _, shape, _ in rows)
        print(f"{len(rows)} arrays, {total:,} numbers")
    if config is None:
        return
    degrees = ", ".join(map(str, fitting_degrees(config)))
    count = parameter_count(config)
    print(
        f"{config.num_layers} layers, hidden {config.hidden_size}, inner "
        f"{config.inner_hidden_size}, {config.num_heads} heads, vocabulary {config.vocab_size}\n"
        f"{count:,} parameters: {2 * count / 2**30:.1f} GiB in 16 bits, "
        f"{count / 2**30:.1f} in 8, {count / 2**31:.1f} in 4\n"
        f"fits a mesh whose tensor axis has {degrees} devices"
    )


if __name__ == "__main__":
    flags.DEFINE_integer(
        "num_heads", None, "number of attention heads, where shards do not say", lower_bound=1
    )
    cli.run_with_paths(main, "PATH")
