"""Measures the Mosaic kernel for compute capability 9.0 beside XLA's float16 product:

    python -m launch.suites.mosaic --output=mosaic.jsonl

Each line is a shape and a number of rows, in microseconds: XLA's product in float16, the kernel
that products have by default, the Mosaic kernel as `choose` divides it and, with
`--candidates`, by every other division; beside them its relative error. `--shapes=tiny` tries
it on a CPU, where the laid-out weight is restored and multiplied by XLA.
"""

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from glm_jax.kernels.quantized_matmul.api import prepare, quantized_matmul
from glm_jax.kernels.quantized_matmul.mosaic_blocks import Problem, candidates
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
    laid_out = [prepare(weight, layout="mosaic") for weight in stored]
    floats = copies_of(shapes, 2 * inputs * outputs)
    plain = [example_weight("float16", inputs, outputs, seed) for seed in range(floats)]
    x = 0.1 * jax.random.normal(jax.random.key(rows), (rows, inputs), jnp.float16)
    runs = {
        "float16": (_all_of(jnp.matmul), plain),
        "default": (_all_of(quantized_matmul), stored),
        "mosaic": (_all_of(quantized_matmul), laid_out),
    }
    group_size = min(GROUP_SIZE, inputs)
    if every and jax.default_backend() == "gpu":
        from glm_jax.kernels.quantized_matmul import mosaic_gpu

        problem = Problem(rows, inputs, outputs, bits, group_size)
        for blocks in candidates(problem, jax.devices()[0].core_count):
            multiply = functools.partial(mosaic_gpu.matmul, blocks=blocks)
            name = ",".join(f"{k}={int(v)}" for k, v in dataclasses.asdict(blocks).items())
            runs[name] = (_all_of(multiply), laid_out)
    taken = interleaved(
        {name: often(functools.partial(run, x, w)) for name, (run, w) in runs.items()}
    )
    each = {name: 1e6 * taken[name] / (REPEATS * len(w)) for name, (_, w) in runs.items()}
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
