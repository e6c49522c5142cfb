"""Compares two models tensor by tensor, in any of their forms, or one with its checksums.

Released tensors are read by other code than the converter's.

python -m convert.verify A B        exit status 1 if any tensor differs
python -m convert.verify A          exit status 1 if anything is not what was written
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from convert.errors import ConvertError
from convert.model_readers import OpenModel, open_model, open_plainly
from convert.numbers import differing
from glm_jax import cli
from glm_jax.model.params import LINEAR_NAMES
from glm_jax.quantization import QuantizedArray, dequantize

FLAGS = flags.FLAGS
_BLOCK = 1 << 22  # numbers that are compared at once, as float64
_SIZES = ("num_layers", "hidden_size", "inner_hidden_size", "num_heads", "vocab_size")


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of a tensor: the greatest absolute difference, and the count of numbers that differ."""

    name: str
    greatest: float
    numbers: int


def compare(a: OpenModel, b: OpenModel) -> Iterator[Difference | None]:
    """Yield each tensor's difference, None where both are equal. NaN equals NaN.

    Quantised kernels are compared dequantised. Floats of another dtype than their model's also
    count as equal if they are so after a cast to it, which a conversion does.

    Raises:
      ConvertError: the models have different architectures.
    """
    for name in _SIZES:
        first, second = getattr(a.config, name), getattr(b.config, name)
        if first != second:
            raise ConvertError(f"{name} is {first} in one model and {second} in the other")
    models = (a, b)
    yield _difference("word_embeddings", a.embedding(), b.embedding(), models)
    norms = (a.final_layernorm(), b.final_layernorm())
    yield from _tree_differences("final_layernorm", *norms, models)
    for i, layers in enumerate(zip(a.layers(), b.layers(), strict=True)):
        first, second = map(_dequantized, layers)
        yield from _tree_differences(f"layers.{i}", first, second, models)


def _dequantized(layer: Any) -> Any:
    for name in LINEAR_NAMES:
        linear = getattr(layer, name)
        if isinstance(linear.kernel, QuantizedArray):
            # In float64 integers times scales are exact.
            values = np.asarray(dequantize(jax.tree.map(jnp.asarray, linear.kernel), "float32"))
            layer = layer.replace(**{name: linear.replace(kernel=values)})
    return layer


def _tree_differences(
    prefix: str, a: Any, b: Any, models: tuple[OpenModel, OpenModel]
) -> Iterator[Difference | None]:
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        yield _difference(f"{prefix}.{name}", x, y, models)


def _difference(
    name: str, x: np.ndarray, y: np.ndarray, models: tuple[OpenModel, OpenModel]
) -> Difference | None:
    greatest, numbers = 0.0, 0
    if x.shape != y.shape:
        raise ConvertError(f"{name} is {x.shape} in one model and {y.shape} in the other")
    rows = max(1, _BLOCK * len(x) // max(x.size, 1))
    for i in range(0, len(x), rows):  # in blocks: views are copied
        p, q = (np.ascontiguousarray(array[i : i + rows]) for array in (x, y))
        if p.dtype == q.dtype and np.array_equal(p.view(np.uint8), q.view(np.uint8)):
            continue
        count, gap = differing(p, q)
        if count:
            cast = [_in_dtype_of(model, name, v) for model, v in zip(models, (p, q), strict=True)]
            count, gap = min((count, gap), differing(*cast))
        numbers, greatest = numbers + count, max(greatest, gap)
    return Difference(name, greatest, numbers) if numbers else None


def _in_dtype_of(model: OpenModel, name: str, values: np.ndarray) -> np.ndarray:
    is_dequantized = model.bits is not None and name.endswith(".kernel")
    if is_dequantized or not jnp.issubdtype(values.dtype, jnp.floating):
        return values
    with np.errstate(over="ignore"):
        return values.astype(model.config.param_dtype)


def check(model: OpenModel) -> int:
    """Read all of a model, which compares it with its checksums.

    Returns:
      The number of its tensors.

    Raises:
      UserError: a tensor is damaged.
    """
    trees = itertools.chain(((model.embedding(), model.final_layernorm()),), model.layers())
    return sum(len(jax.tree.leaves(tree)) for tree in trees)


def main(paths: list[str]) -> None:
    if len(paths) == 1:
        # Of the two readers of released shards only the converter's checks checksums.
        model = open_model(paths[0], FLAGS.num_heads, FLAGS.allow_differing_copies)
        print(f"{paths[0]}: {model.kind}")
        print(f"all {check(model)} tensors are whole")
        return
    models = [open_plainly(path, FLAGS.num_heads, FLAGS.allow_differing_copies) for path in paths]
    for path, model in zip(paths, models, strict=True):
        print(f"{path}: {model.kind}")
    count, found = 0, []
    for difference in compare(*models):
        count += 1
        if difference is not None:
            found.append(difference)
            print(
                f"{difference.name}: {difference.numbers} numbers differ, "
                f"by {difference.greatest:.3g} at most"
            )
    if found:
        greatest = max(found, key=lambda d: d.greatest)
        raise ConvertError(
            f"{len(found)} of {count} tensors differ, {greatest.name} by {greatest.greatest:.3g}"
        )
    print(f"all {count} tensors are equal")


if __name__ == "__main__":
    flags.DEFINE_integer(
        "num_heads", None, "number of attention heads, where shards do not say", lower_bound=1
    )
    flags.DEFINE_bool(
        "allow_differing_copies",
        False,
        "where shards' copies of a whole tensor differ, take the first shard's",
    )
    cli.run_with_paths(main, "A", "[B]")
