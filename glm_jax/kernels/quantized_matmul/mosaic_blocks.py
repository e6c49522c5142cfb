"""How the kernel for compute capability 9.0 divides a product: what it takes, and what is tried.

The rules below follow from counts of bytes, instructions and registers. No GPU has confirmed
them: `candidates` is what a measurement chooses from.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax.numpy as jnp

from glm_jax.kernels.quantized_matmul.arguments import Problem
from glm_jax.kernels.quantized_matmul.mosaic_layout import TILE, MosaicArray
from glm_jax.quantization import QuantizedArray

COPYING_REGISTERS = 40  # of a thread that copies
_SHARED_MEMORY = 227 * 1024 - 4096  # bytes of a program, less barriers and alignment
_FEW_ROWS = 64  # up to here a tile holds all rows, and groups are scaled after they are summed
_MAX_STAGES = 8
_REGISTERS = 65536  # of a multiprocessor
_OTHER_REGISTERS = 24  # of a thread; with 8 left the compiler has too few, with 28 enough


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the kernel divides its work.

    Attributes:
      rows: of a tile, a multiple of 8 up to 256.
      tiles: of 64 outputs, of one warpgroup.
      consumers: warpgroups that multiply.
      inputs: of a step, a multiple of 64.
      stages: steps that are in shared memory at once.
      programs: that run at once, one a multiprocessor.
      whole: gives programs whole tiles, so that no parts are to add.
      scale_first: scales weights, rounded to x's dtype, before they are multiplied, and not a
        group's products after: where rows are many.
      raw: multiplies 4-bit values as `mosaic_registers.raw_form` says, which takes the sums of
        activations as one more operand.
    """

    rows: int
    tiles: int
    consumers: int
    inputs: int
    stages: int
    programs: int
    whole: bool = False
    scale_first: bool = False
    raw: bool = False

    @property
    def output_tiles(self) -> int:
        return self.tiles * self.consumers

    @property
    def outputs(self) -> int:
        return TILE * self.output_tiles

    @property
    def registers(self) -> int:
        """Of a thread that multiplies: what threads that copy leave, in eights.

        A block gets no more than what its threads start with, all as many: one that asks for
        more hangs.
        """
        warpgroups = self.consumers + 1
        left = _REGISTERS // (128 * warpgroups) // 8 * 8 * warpgroups - COPYING_REGISTERS
        return min(232, left // self.consumers // 8 * 8)


@dataclasses.dataclass(frozen=True)
class ConvertedTiles:
    """Sizes of the tiles of `mosaic_converted`, multiples of 64 that divide a weight's."""

    inputs: int
    outputs: int


@dataclasses.dataclass(frozen=True)
class Division:
    """Which steps a program takes: `share` of them one after another, tile after tile.

    Attributes:
      row_tiles, output_tiles: number of tiles; those of the same outputs follow each other.
      steps: of a tile.
      share: steps of a program.
    """

    row_tiles: int
    output_tiles: int
    steps: int
    share: int

    @property
    def total(self) -> int:
        return self.row_tiles * self.output_tiles * self.steps

    @property
    def programs(self) -> int:
        return -(-self.total // self.share)

    def parts(self) -> list[int]:
        """Return the number of programs that work on each tile."""
        first = range(0, self.total, self.steps)
        return [(f + self.steps - 1) // self.share - f // self.share + 1 for f in first]


def divide(problem: Problem, blocks: Blocks) -> Division:
    """Divides a product among programs; its rows are rounded up to whole tiles."""
    row_tiles = -(-problem.rows // blocks.rows)
    output_tiles = problem.outputs // blocks.outputs
    tiles, steps = row_tiles * output_tiles, problem.inputs // blocks.inputs
    whole = -(-tiles // blocks.programs) * steps
    share = whole if blocks.whole else -(-tiles * steps // blocks.programs)
    return Division(row_tiles, output_tiles, steps, share)


def supports(weight: QuantizedArray | MosaicArray, dtype: Any) -> str | None:
    """Why the kernel does not multiply activations of a dtype with a weight [K, *outputs]; None
    if it does."""
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.float16), jnp.dtype(jnp.bfloat16)):
        return f"activations are {jnp.dtype(dtype)}, not float16 or bfloat16"
    inputs, outputs = weight.shape[0], math.prod(weight.shape[1:])
    if inputs % TILE or outputs % TILE:
        return f"{inputs} inputs and {outputs} outputs are no multiples of {TILE}"
    if weight.group_size != 32 and weight.group_size % TILE:
        return f"groups of {weight.group_size} inputs are neither 32 nor a multiple of {TILE}"
    return None


def choose(problem: Problem, programs: int) -> Blocks:
    """Return the candidate that keeps most multiprocessors busy, for devices that nobody measured.

    Of each two that follow each other the later must keep 2% more busy, or 10% where rows are
    many: larger tiles read activations less often.

    Args:
      programs: multiprocessors of the device.

    Raises:
      ValueError: nothing divides the problem, which `supports` has a reason against.
    """

    gain = 0.02 if problem.rows <= _FEW_ROWS else 0.1
    return busiest(problem, candidates(problem, programs), gain)


def busiest(problem: Problem, ranked: Iterable[Blocks], gain: float) -> Blocks:
    """Return the blocks that keep most multiprocessors busy.

    Args:
      ranked: those first that are expected to be the fastest.
      gain: share of the multiprocessors that a later one must keep busy beyond the one before it.

    Raises:
      ValueError: there are none, as nothing divides the problem.
    """

    def busy(item: tuple[int, Blocks]) -> float:
        index, blocks = item
        division = divide(problem, blocks)
        return division.total / (division.share * blocks.programs) - gain * index

    numbered = list(enumerate(ranked))
    if not numbered:
        raise ValueError(f"no blocks of the kernel divide {problem}")
    return max(numbered, key=busy)[1]


def converted_candidates(problem: Problem) -> Iterator[ConvertedTiles]:
    """Tiles worth measuring, those first that are expected to be the fastest; none where rows are
    few, and the kernel reads less."""
    if problem.transposed or problem.rows > _FEW_ROWS:
        # The last ones are larger than what surely stays in the cache, and make fewer steps.
        sizes = ((4096, 2048), (2048, 4096), (2048, 2048), (8192, 1024), (4096, 4096))
        yield from dict.fromkeys(converted_tiles(problem, *size) for size in sizes)


def converted_tiles(problem: Problem, depth: int = 4096, width: int = 2048) -> ConvertedTiles:
    """Tiles of 16 MiB in float16, less where larger ones do not divide the weight.

    As many outputs and rows as keep all multiprocessors of a GPU busy with one product.

    Args:
      depth: at most so many of what is summed over: inputs, outputs in the transposed product.
      width: at most so many of the others.
    """
    inputs, outputs = (width, depth) if problem.transposed else (depth, width)
    steps = filter(problem.has_whole_groups_in, _divisors(problem.inputs, inputs))
    return ConvertedTiles(
        inputs=max(steps, default=TILE),
        outputs=max(_divisors(problem.outputs, outputs)),
    )


def _divisors(size: int, limit: int) -> Iterator[int]:
    """Multiples of 64 up to a limit that divide a size."""
    return (n for n in range(TILE, max(limit, TILE) + 1, TILE) if size % n == 0)


def candidates(problem: Problem, programs: int) -> Iterator[Blocks]:
    """Blocks worth measuring, those first that are expected to be the fastest.

    Args:
      programs: multiprocessors of the device.
    """
    few = problem.rows <= _FEW_ROWS
    rows = -(-problem.rows // 8) * 8 if few else 128
    # Accumulators of 64 outputs take rows / 2 registers, twice where groups are added to totals.
    if rows <= 16:
        shapes = [(2, 2), (2, 3), (1, 4), (1, 3), (1, 2), (1, 1)]
    elif rows <= 32:
        shapes = [(2, 2), (1, 3), (1, 2), (1, 1)]
    else:
        shapes = [(1, 2), (1, 1)] if few else [(2, 2), (1, 2), (1, 1)]
    # Short steps are the last resort: each has its own waits, and products of groups to add.
    steps = (256, 128, 64) if few else (128, 64)
    for inputs, (tiles, consumers) in itertools.product(steps, shapes):
        if problem.outputs % (TILE * tiles * consumers) or problem.inputs % inputs:
            continue
        if not problem.has_whole_groups_in(inputs):
            continue
        blocks = Blocks(
            rows=rows,
            tiles=tiles,
            consumers=consumers,
            inputs=inputs,
            stages=1,
            programs=programs,
            scale_first=not few,
            raw=few and problem.bits == 4,
        )
        stages = min(_MAX_STAGES, _SHARED_MEMORY // _stage_bytes(problem, blocks))
        if stages < 3 or (few and _needed_registers(problem, blocks) > blocks.registers):
            continue
        blocks = dataclasses.replace(blocks, stages=stages)
        yield give_whole_tiles(problem, blocks)


def give_whole_tiles(problem: Problem, blocks: Blocks) -> Blocks:
    """Return the blocks, with whole tiles for programs where each has several of them: parts of the
    product would take its memory once more, and they are to add."""
    division = divide(problem, blocks)
    whole = division.row_tiles * division.output_tiles >= 4 * blocks.programs
    return dataclasses.replace(blocks, whole=whole)


def _needed_registers(problem: Problem, blocks: Blocks) -> int:
    """Of a thread that multiplies few rows: weights of two products, one that runs and one that is
    next, products of all groups of a step, and totals. With less the compiler spills, or has each
    matrix instruction wait for the one before."""
    group = min(problem.group_size, blocks.inputs)
    weights = min(2 * group, blocks.inputs * blocks.tiles) // 4
    sums = (blocks.inputs // group + 1) * blocks.tiles * blocks.rows // 2
    return weights + sums + _OTHER_REGISTERS


def aligned_rows(rows: int) -> int:
    """Return how many sums of rows lie in shared memory for a block's: a copy by TMA must begin
    at a multiple of 128 bytes there, in each stage."""
    return -(-rows // 32) * 32


def _stage_bytes(problem: Problem, blocks: Blocks) -> int:
    groups = max(1, blocks.inputs // problem.group_size)
    values = blocks.outputs * blocks.inputs * problem.bits // 8
    scales = groups * blocks.outputs * 4 * (2 if problem.zeros else 1)
    sums = groups * aligned_rows(blocks.rows) * 4
    return values + 2 * blocks.rows * blocks.inputs + scales + sums
