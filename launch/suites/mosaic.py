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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from glm_jax.kernels.quantized_matmul import mosaic_blocks, mosaic_converted, reference
from glm_jax.kernels.quantized_matmul.api import quantized_matmul, transposed_matmul
from glm_jax.kernels.quantized_matmul.arguments import Problem
from glm_jax.kernels.quantized_matmul.measured import Product
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
    }
    ways |= {name: (run, x, laid_out) for name, run in _products(x, laid_out[0], every).items()}
    if rows > _FEW_ROWS:
        y = draw(outputs)
        ways["transposed float16"] = (lambda y, weight: jnp.matmul(y, weight.T), y, plain)
        ways["transposed default"] = (transposed_matmul, y, stored)
        transposed = _transposed(y, laid_out[0], every)
        ways |= {name: (run, y, laid_out) for name, run in transposed.items()}
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


def _products(x: jax.Array, weight: Any, every: bool) -> dict[str, Multiply]:
    """The product, by the first of converted tiles and, if `every`, by all candidates."""
    problem = Problem.of(x, weight)
    found: dict[str, Multiply] = {"mosaic": quantized_matmul}
    tried = mosaic_blocks.converted_candidates(problem)
    for tiles in itertools.islice(tried, None if every else 1):
        multiply = functools.partial(mosaic_converted.matmul, tiles=tiles)
        found[f"converted {_name(tiles)}"] = multiply
    if every and jax.default_backend() == "gpu":
        from glm_jax.kernels.quantized_matmul import mosaic_gpu

        for blocks in mosaic_blocks.candidates(problem, jax.devices()[0].core_count):
            found[_name(blocks)] = functools.partial(mosaic_gpu.matmul, blocks=blocks)
    return found


def _transposed(y: jax.Array, weight: Any, every: bool) -> dict[str, Multiply]:
    """The product with the transpose and, if `every`, by all candidates."""
    found: dict[str, Multiply] = {"transposed": transposed_matmul}
    problem = Problem.of(y, weight, transposed=True)
    for tiles in mosaic_blocks.converted_candidates(problem) if every else ():
        multiply = functools.partial(mosaic_converted.transposed_matmul, tiles=tiles)
        found[f"transposed {_name(tiles)}"] = multiply
    return found


def _name(blocks: Any) -> str:
    return ",".join(f"{k}={int(v)}" for k, v in dataclasses.asdict(blocks).items())


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
