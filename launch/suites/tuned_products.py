"""What `launch.tune` measures: each way to multiply with a quantised weight, on this device."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp

from glm_jax.config import GLMConfig
from glm_jax.kernels import target
from glm_jax.kernels.dispatch import Backend, BackendError
from glm_jax.kernels.quantized_matmul import reference
from glm_jax.kernels.quantized_matmul.api import prepare
from glm_jax.kernels.quantized_matmul.arguments import Arguments
from glm_jax.kernels.quantized_matmul.measured import Entry, Product, blocks_of, variants
from glm_jax.model import params as glm_params
from glm_jax.quantization import QuantizedArray, Scheme
from glm_jax.sharding import MESH_AXES, MeshError, parameter_spec
from launch.suites.gpu_parts import (
    MAX_ERROR,
    REPEATS,
    SHAPES,
    copies_of,
    error_of,
    example_weight,
    interleaved,
    often,
    turns_of,
    words_of,
)

Failure = dict[str, Any]  # what a table's `left_out` holds
Trial = Callable[[Failure], AbstractContextManager[None]]
Way = tuple[Failure, Backend[Arguments]]  # a candidate's record, and what computes it
Operands = tuple[list[jax.Array], list[Any]]  # activations, and weights

# Rows, those that tell most first: a decode step, a batch of them, a prompt.
ROWS = (1, 32, 2048, 8, 128, 64, 16, 512)
_FINALISTS = 4  # of all candidates, after one round


@dataclasses.dataclass(frozen=True)
class Case:
    """A product whose fastest implementation is to be found."""

    product: Product
    rows: int

    @property
    def weight_bytes(self) -> int:
        """Of values, scales and zero points."""
        stored = dataclasses.replace(self.product, layout="stored")
        return int(_described(stored).nbytes)

    def __str__(self) -> str:
        product = self.product
        groups = "" if product.group_size == product.inputs else f" group={product.group_size}"
        zeros = " zero_point" if product.zero_points else ""
        rows = f"{self.rows} row{'s' * (self.rows > 1)}"
        size = f"{product.inputs} x {product.outputs}"
        return f"int{product.bits}{groups}{zeros} {size} {product.layout}, {rows}"


def linear_shapes(config: GLMConfig, parallel: int) -> list[tuple[int, int]]:
    """Return [K, N] of a model's linears on one of `parallel` tensor-parallel devices.

    Returns:
      Nothing if the model cannot be divided so.
    """
    sizes = dict(zip(MESH_AXES, (1, 1, parallel), strict=True))
    layers: Any = glm_params.specs(config).layers
    shapes = []
    with contextlib.suppress(MeshError):
        for name, axes in glm_params.KERNEL_AXES.items():
            shape = getattr(layers, name).kernel.shape[1:]
            spec = parameter_spec(sizes, axes, shape)
            local = [n // (sizes[axis] if axis else 1) for n, axis in zip(shape, spec, strict=True)]
            shapes.append((local[0], math.prod(local[1:])))
        return shapes
    return []


def cases(
    shapes: Sequence[tuple[int, int]],
    schemes: Sequence[Scheme],
    rows: Sequence[int],
    layouts: Sequence[str],
) -> list[Case]:
    """Return what to measure, that which matters most first.

    The layout that weights have here goes before others; the first schemes and rows before later
    ones, in turn. Of each all shapes.
    """
    ranked = itertools.product(enumerate(schemes), enumerate(rows))
    ordered = sorted(ranked, key=lambda pair: (pair[0][0] + pair[1][0], pair[0][0]))
    found: dict[Case, None] = {}
    for layout, ((_, scheme), (_, count)), shape in itertools.product(layouts, ordered, shapes):
        group = scheme.group_size or shape[0]
        if shape[0] % group == 0:
            product = Product(layout, scheme.bits, group, scheme.zero_point, *shape)
            found[Case(product, count)] = None
    return list(found)


def layouts_here(backends: Sequence[Backend[Arguments]]) -> tuple[str, ...]:
    """Return the layouts of weights to measure: first that of a kernel for this device, if any."""
    laid_out = arguments_of(Case(Product("mosaic", 4, 64, False, 128, 64), 1))
    of_device = [each for each in backends if each.platform == target.platform()]
    has_kernel = any(each.supports(laid_out) is None for each in of_device)
    return ("mosaic", "stored") if has_kernel else ("stored",)


def arguments_of(case: Case) -> Arguments:
    """Return descriptions of a case's arguments.

    Raises:
      BackendError: such a weight has no such layout.
    """
    x = jax.ShapeDtypeStruct((case.rows, case.product.inputs), jnp.float16)
    return Arguments(x, _described(case.product))


@functools.cache
def _described(product: Product) -> Any:
    return jax.eval_shape(lambda: example(product, 0))


def can_be_laid_out(product: Product) -> bool:
    """Return whether there is such a weight in such a layout."""
    try:
        return _described(product) is not None
    except BackendError:
        return False


def example(product: Product, seed: Any) -> Any:
    """Return a weight whose numbers look random, in the product's layout."""
    stored: Any = example_weight(f"int{product.bits}", product.inputs, product.outputs, seed)
    shape = (product.inputs // product.group_size, product.outputs)
    of_scales, of_zeros = jax.random.split(jax.random.key(seed))
    zeros = jax.random.randint(of_zeros, shape, -3, 4, jnp.int8) if product.zero_points else None
    scales = jax.random.uniform(of_scales, shape, jnp.float16, 0.005, 0.015)
    weight: QuantizedArray = stored.replace(scales=scales, zero_points=zeros)
    return weight if product.layout == "stored" else prepare(weight, layout=product.layout)


def record_of(case: Case, backend: Backend[Arguments]) -> Failure:
    """Return what tells a candidate from all others."""
    return _record(case) | {"implementation": backend.name, "blocks": blocks_of(backend)}


def _record(case: Case) -> Failure:
    return dataclasses.asdict(case.product) | {"rows": case.rows}


def measure(
    case: Case,
    backends: Sequence[Backend[Arguments]],
    trial: Trial,
    left_out: Sequence[Failure],
    candidates: int,
    one_by_one: bool = False,
) -> tuple[Entry | None, list[Failure]]:
    """Find the fastest of all ways to multiply, beside XLA's float16 product.

    Args:
      backends: the op's; each is tried with all of its blocks.
      trial: entered while a candidate runs for the first time, with its record; and while all
        are compiled at once, with the case's.
      left_out: candidates that failed before, by their records.
      candidates: block sizes of each backend to try at most, its first ones.
      one_by_one: compiles each candidate alone, as a trial of its own.

    Returns:
      The fastest that is right, None if there is none, and those that failed now, with `reason`.
    """
    product = case.product
    make = jax.jit(lambda seed: example(product, seed))
    operands = _operands(case, product.bits, make)
    ways: dict[str, Way] = {}
    for backend in backends:
        for way in itertools.islice(variants([backend], arguments_of(case)), candidates):
            record = record_of(case, way)
            if not any(record.items() <= failure.items() for failure in left_out):
                ways.setdefault(str(record), (record, way))
    compiled: dict[str, Any] = {}
    failures: list[Failure] = []
    batches = [(way[0], {name: way}) for name, way in ways.items()]
    for record, batch in batches if one_by_one else [(_record(case), ways)]:
        with trial(record):
            programs, failed = _compile(operands, batch)
        compiled |= programs
        failures += failed
    exact = _exact(product, operands[0][0])
    runs = {}
    for name, program in compiled.items():
        record = ways[name][0]
        with trial(record):
            first, *_ = jax.block_until_ready(program(*operands))
        error = error_of(first, exact)
        if error <= MAX_ERROR:
            runs[name] = functools.partial(program, *operands)
        else:
            failures.append(record | {"reason": f"wrong numbers, off by {error:.3g} of their size"})
    if not runs:
        return None, failures
    fastest, us, float16_us = _race(case, len(operands[0]) * len(operands[1]), runs)
    record, backend = ways[fastest]
    return Entry(product, case.rows, backend.name, record["blocks"], us, float16_us), failures


def _operands(case: Case, bits: int, make: Callable[[int], Any]) -> Operands:
    """Return activations and weights, each of which a program multiplies with each.

    Weights are more than a cache holds; activations are all different.
    """
    product = case.product
    size = product.inputs * product.outputs * bits // 8
    count = copies_of(SHAPES["full"], size)
    shape = case.rows, product.inputs
    keys = jax.random.split(jax.random.key(0), turns_of(case.rows, count * size))
    # With a mean, which kernels that take offsets off by sums of activations could get wrong.
    draw = jax.jit(lambda key: 0.1 * (jax.random.normal(key, shape, jnp.float16) + 0.5))
    activations = [draw(key) for key in keys]
    return activations, [make(seed) for seed in range(count)]


def _compile(operands: Operands, ways: Mapping[str, Way]) -> tuple[dict[str, Any], list[Failure]]:
    """Return the program of each way, and the ways that have none."""
    compiled, failures, lowered = {}, [], {}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, (record, backend) in ways.items():
            try:
                program = all_of(functools.partial(_product, backend)).lower(*operands)
                lowered[name] = pool.submit(program.compile)
            except Exception as error:  # whatever a compiler raises
                failures.append(record | {"reason": words_of(error)})
        for name, future in lowered.items():
            try:
                compiled[name] = future.result()
            except Exception as error:
                failures.append(ways[name][0] | {"reason": words_of(error)})
    return compiled, failures


def _product(backend: Backend[Arguments], x: jax.Array, weight: Any) -> jax.Array:
    return backend(Arguments(x, weight))


def all_of(product: Callable[[jax.Array, Any], jax.Array]) -> Any:
    """Return a program of all activations times all weights; the product is traced once.

    Each product computes all of its own, as a model's do: without barriers XLA joins those that
    share activations or a weight into one of more columns or rows, and shares what they derive
    from them, such as sums.
    """
    once = jax.jit(product)
    alone = lambda x, weight: once(*jax.lax.optimization_barrier((x, weight)))
    return jax.jit(lambda xs, weights: [alone(x, weight) for x in xs for weight in weights])


def _exact(product: Product, x: jax.Array) -> jax.Array:
    """Return the product with the first weight, dequantised to float32."""
    stored = dataclasses.replace(product, layout="stored")
    multiply = lambda x: reference.matmul(x.astype(jnp.float32), example(stored, 0))
    return jax.jit(multiply)(x)


def _race(
    case: Case, count: int, programs: Mapping[str, Callable[[], object]]
) -> tuple[str, float, float]:
    """Return the fastest, its microseconds for one product, and those of XLA's in float16.

    Args:
      count: products of a program.
    """
    once = interleaved({name: often(run) for name, run in programs.items()}, rounds=1)
    finalists = sorted(once, key=lambda name: once[name])[:_FINALISTS]
    size = case.product.inputs, case.product.outputs
    floats = _operands(case, 16, lambda seed: example_weight("float16", *size, seed))
    plain = all_of(jnp.matmul)
    runs = {name: often(programs[name]) for name in finalists}
    taken = interleaved(runs | {"float16": often(lambda: plain(*floats))})
    float16 = taken.pop("float16") / (REPEATS * len(floats[0]) * len(floats[1]))
    fastest = min(taken, key=lambda name: taken[name])
    return fastest, _us(taken[fastest] / (REPEATS * count)), _us(float16)


def _us(seconds: float) -> float:
    return round(1e6 * seconds, 3)
