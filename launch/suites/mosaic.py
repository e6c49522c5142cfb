"""Measures the Mosaic kernel for compute capability 9.0 beside XLA's float16 product:

    python -m launch.suites.mosaic --output=mosaic.jsonl

Each line is a shape and a number of rows, in microseconds: XLA's product in float16, the kernel
that products have by default, the Mosaic kernel as `choose` divides it, tiles converted to floats
and, with `--candidates`, every other division of both; beside them its relative error. From 65 rows
on the product with the transpose, in float16 and from the laid-out weight, is timed too.
`--shapes=tiny` tries it on a CPU, where the kernel does not run.
"""

import argparse
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from glm_jax.kernels.quantized_matmul import mosaic, reference
from glm_jax.kernels.quantized_matmul.api import quantized_matmul, transposed_matmul
from glm_jax.kernels.quantized_matmul.arguments import Arguments
from glm_jax.kernels.quantized_matmul.measured import Product, variants
from launch.suites.gpu_parts import (
    REPEATS,
    SHAPES,
    Result,
    Shapes,
    about,
    copies_of,
    example_weight,
    interleaved,
    often,
)
from launch.suites.tuned_products import all_of, example

GROUP_SIZE = 128
_FEW_ROWS = 64
_COMPARED = 256  # outputs
_KERNELS = mosaic.Mosaic(), mosaic.MosaicTiles(), mosaic.MosaicConverted()
_TRANSPOSED = mosaic.MosaicTilesTransposed(), mosaic.MosaicConvertedTransposed()
Multiply = Callable[..., jax.Array]  # (activations, weight) to their product


def mosaic_products(
    shapes: Shapes, every: bool, bits: tuple[int, ...] = (4, 8)
) -> Iterator[Result]:
    """Times and errors of products, those of shapes that differ most from each other first.

    Args:
      every: times all of `candidates`, not only the one that `choose` takes.
    """
    for rows, size, width in itertools.product(shapes.rows, shapes.products, bits):
        product = Product("mosaic", width, min(GROUP_SIZE, size[0]), False, *size)
        yield _measure(shapes, rows, product, every)


def _measure(shapes: Shapes, rows: int, product: Product, every: bool) -> Result:
    inputs, outputs, bits = product.inputs, product.outputs, product.bits
    seeds = range(copies_of(shapes, inputs * outputs * bits // 8))
    stored = [example(dataclasses.replace(product, layout="stored"), seed) for seed in seeds]
    laid_out = [example(product, seed) for seed in seeds]
    floats = range(copies_of(shapes, 2 * inputs * outputs))
    plain = [example_weight("float16", inputs, outputs, seed) for seed in floats]
    draw = lambda size: 0.1 * jax.random.normal(jax.random.key(rows), (rows, size), jnp.float16)
    x = draw(inputs)
    ways: dict[str, tuple[Multiply, jax.Array, list[Any]]] = {
        "float16": (jnp.matmul, x, plain),
        "default": (quantized_matmul, x, stored),
        "mosaic": (quantized_matmul, x, laid_out),
    }
    kernels: Sequence[Any] = _KERNELS if every else _KERNELS[-1:]
    for name, run in _candidates(kernels, Arguments(x, laid_out[0]), every):
        ways[name] = run, x, laid_out
    if rows > _FEW_ROWS:
        y = draw(outputs)
        ways["transposed float16"] = (lambda y, weight: jnp.matmul(y, weight.T), y, plain)
        ways["transposed default"] = (transposed_matmul, y, stored)
        ways["transposed"] = (transposed_matmul, y, laid_out)
        kernels = _TRANSPOSED if every else ()
        for name, run in _candidates(kernels, Arguments(y, laid_out[0]), every):
            ways[f"transposed {name}"] = run, y, laid_out
    taken = interleaved(
        {name: often(functools.partial(all_of(run), [a], w)) for name, (run, a, w) in ways.items()}
    )
    each = {name: 1e6 * taken[name] / (REPEATS * len(w)) for name, (_, _, w) in ways.items()}
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(laid_out[0]))
    return {
        "inputs": inputs,
        "outputs": outputs,
        "rows": rows,
        "bits": bits,
        "group_size": product.group_size,
        "TBps": size / each["mosaic"] / 1e6,
        "error": _error(x, stored[0], laid_out[0]),
        "us": each,
    }


def _candidates(
    backends: Sequence[Any], arguments: Arguments, every: bool
) -> Iterator[tuple[str, Multiply]]:
    """Products, by their names, with all candidates of each backend or with its first."""
    for backend in backends:
        for way in itertools.islice(variants([backend], arguments), None if every else 1):
            yield f"{way.name} {_sizes(way)}", functools.partial(_multiply, way)


def _multiply(backend: Any, x: jax.Array, weight: Any) -> jax.Array:
    product: jax.Array = backend(Arguments(x, weight))
    return product


def _sizes(backend: Any) -> str:
    return ",".join(f"{k}={int(v)}" for k, v in dataclasses.asdict(backend.blocks).items())


def _error(x: jax.Array, stored: Any, laid_out: Any) -> float:
    """Of some outputs, relative to the product in float32."""
    ours = jax.jit(quantized_matmul)(x, laid_out)[:, :_COMPARED]
    part = jax.tree.map(lambda a: a[:, :_COMPARED], stored)
    with jax.default_matmul_precision("highest"):
        exact = reference.matmul(x.astype(jnp.float32), part)
    return float(jnp.linalg.norm(ours - exact) / jnp.linalg.norm(exact))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", choices=list(SHAPES), default="full")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--candidates", action="store_true")
    options = parser.parse_args(arguments)
    with options.output.open("a", encoding="utf-8") as file:
        print(json.dumps(about()), file=file, flush=True)
        for result in mosaic_products(SHAPES[options.shapes], options.candidates):
            print(json.dumps(result), file=file, flush=True)
            print({name: value for name, value in result.items() if name != "us"}, result["us"])


if __name__ == "__main__":
    main()
