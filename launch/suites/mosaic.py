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

from glm_jax.kernels.quantized_matmul import mosaic_converted
from glm_jax.kernels.quantized_matmul.api import prepare, quantized_matmul, transposed_matmul
from glm_jax.kernels.quantized_matmul.arguments import Problem
from glm_jax.kernels.quantized_matmul.mosaic_blocks import candidates, converted_candidates
from glm_jax.quantization import QuantizedArray, dequantize
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

GROUP_SIZE = 128
_FEW_ROWS = 64
_COMPARED = 256  # outputs


def mosaic_products(
    shapes: Shapes, every: bool, bits: tuple[int, ...] = (4, 8)
) -> Iterator[Result]:
    """Times and errors of products, those of shapes that differ most from each other first.

    Args:
      every: times all of `candidates`, not only the one that `choose` takes.
    """
    for rows in shapes.rows:
        for inputs, outputs in shapes.products:
            for width in bits:
                yield _measure(shapes, rows, inputs, outputs, width, every)


def _measure(
    shapes: Shapes, rows: int, inputs: int, outputs: int, bits: int, every: bool
) -> Result:
    count = copies_of(shapes, inputs * outputs * bits // 8)
    stored = [
        _grouped(example_weight(f"int{bits}", inputs, outputs, seed)) for seed in range(count)
    ]
    laid_out: list[Any] = [prepare(weight, layout="mosaic") for weight in stored]
    floats = copies_of(shapes, 2 * inputs * outputs)
    plain = [example_weight("float16", inputs, outputs, seed) for seed in range(floats)]
    x = 0.1 * jax.random.normal(jax.random.key(rows), (rows, inputs), jnp.float16)
    runs = {
        "float16": (_all_of(jnp.matmul), x, plain),
        "default": (_all_of(quantized_matmul), x, stored),
        "mosaic": (_all_of(quantized_matmul), x, laid_out),
    }
    for name, multiply in _others(x, laid_out[0], every).items():
        runs[name] = (_all_of(multiply), x, laid_out)
    if rows > _FEW_ROWS:
        y = 0.1 * jax.random.normal(jax.random.key(rows), (rows, outputs), jnp.float16)
        turned = lambda y, weight: jnp.matmul(y, weight.T)
        runs["transposed float16"] = (_all_of(turned), y, plain)
        runs["transposed default"] = (_all_of(transposed_matmul), y, stored)
        runs["transposed"] = (_all_of(transposed_matmul), y, laid_out)
        for name, multiply in _others_transposed(y, laid_out[0], every).items():
            runs[name] = (_all_of(multiply), y, laid_out)
    group_size = laid_out[0].group_size
    taken = interleaved(
        {name: often(functools.partial(run, a, w)) for name, (run, a, w) in runs.items()}
    )
    each = {name: 1e6 * taken[name] / (REPEATS * len(w)) for name, (_, _, w) in runs.items()}
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(laid_out[0]))
    return {
        "inputs": inputs,
        "outputs": outputs,
        "rows": rows,
        "bits": bits,
        "group_size": group_size,
        "TBps": size / each["mosaic"] / 1e6,
        "error": _error(x, stored[0], laid_out[0]),
        "us": each,
    }


def _others(x: jax.Array, weight: Any, every: bool) -> dict[str, Callable[..., Any]]:
    """Products by converted tiles and, if `every`, by all candidates."""
    problem = Problem.of(x, weight)
    found: dict[str, Callable[..., Any]] = {}
    for tiles in itertools.islice(converted_candidates(problem), None if every else 1):
        multiply = functools.partial(mosaic_converted.matmul, tiles=tiles)
        found[f"converted {_name(tiles)}"] = multiply
    if every and jax.default_backend() == "gpu":
        from glm_jax.kernels.quantized_matmul import mosaic_gpu

        for blocks in candidates(problem, jax.devices()[0].core_count):
            found[_name(blocks)] = functools.partial(mosaic_gpu.matmul, blocks=blocks)
    return found


def _others_transposed(y: jax.Array, weight: Any, every: bool) -> dict[str, Callable[..., Any]]:
    """Products with the transpose by all candidates, if `every`."""
    tiles = converted_candidates(Problem.of(y, weight, transposed=True)) if every else ()
    multiply = mosaic_converted.transposed_matmul
    return {f"transposed {_name(t)}": functools.partial(multiply, tiles=t) for t in tiles}


def _name(blocks: Any) -> str:
    return ",".join(f"{k}={int(v)}" for k, v in dataclasses.asdict(blocks).items())


def _all_of(product: Callable[..., Any]) -> Any:
    return jax.jit(lambda x, weights: [product(x, weight) for weight in weights])


def _grouped(weight: QuantizedArray) -> QuantizedArray:
    """With a scale for each group, all different."""
    inputs, outputs = weight.shape
    shape = (max(1, inputs // GROUP_SIZE), outputs)
    scales = jax.random.uniform(jax.random.key(0), shape, jnp.float16, 0.005, 0.015)
    return weight.replace(scales=scales)  # type: ignore[attr-defined]


def _error(x: jax.Array, stored: QuantizedArray, laid_out: Any) -> float:
    """Of some outputs, relative to the product in float32."""
    ours = jax.jit(quantized_matmul)(x, laid_out)[:, :_COMPARED]
    part: QuantizedArray = jax.tree.map(lambda a: a[:, :_COMPARED], stored)
    with jax.default_matmul_precision("highest"):
        exact = jnp.matmul(x.astype(jnp.float32), dequantize(part, "float32"))
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
