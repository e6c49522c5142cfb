"""How the Triton kernel divides a product: plain rules, and what a measurement chooses from."""

import dataclasses
import itertools
from collections.abc import Iterator

from glm_jax.kernels.quantized_matmul.arguments import Problem

_MAX_ROWS_SPLIT = 32  # above, rows alone make programs for all multiprocessors
_PROGRAMS = 512  # at least, so that every multiprocessor of the largest GPUs has some
_SPLITS = (1, 2, 4, 8, 16)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the kernel divides its work. Sizes are powers of two, all that Triton takes.

    Attributes:
      rows, outputs, inputs: sizes of a block; outputs divide the weight's, inputs a group's.
      splits: programs among which the inputs are divided, each taking whole blocks.
      warps: of a program.
      stages: blocks of the pipeline that reads ahead.
    """

    rows: int
    outputs: int
    inputs: int
    splits: int
    warps: int
    stages: int


def choose(problem: Problem) -> Blocks | None:
    """Return the blocks of a device that nobody measured; None where none divide the problem.

    Few rows: large blocks, and the inputs split among programs until there are enough. Many rows:
    shorter blocks, which leave registers for more sums.
    """
    is_few = problem.rows <= _MAX_ROWS_SPLIT
    most_rows = 64 if problem.bits == 4 else 128  # with 128, both halves of a byte spill registers
    rows = next((size for size in (16, 32, 64) if problem.rows <= size), most_rows)
    outputs = _dividing(problem.outputs, (128, 64, 32))
    inputs = _dividing(problem.group_size, (128, 64, 32) if is_few else (64, 32))
    if outputs is None or inputs is None:
        return None
    splits = 1
    for count in _SPLITS if is_few else ():
        if problem.inputs % (count * inputs) == 0:
            splits = count
            if problem.outputs // outputs * count >= _PROGRAMS:
                break
    return Blocks(rows, outputs, inputs, splits, _warps(rows, outputs), 4 if is_few else 3)


def candidates(problem: Problem) -> Iterator[Blocks]:
    """Yield the blocks worth measuring: those of `choose`, then such as differ most first."""
    first = choose(problem)
    if first is not None:
        yield from dict.fromkeys((first, *_fitting(problem)))


def _fitting(problem: Problem) -> Iterator[Blocks]:
    rows = (16,) if problem.rows <= 16 else (32,) if problem.rows <= 32 else (64, 128)
    splits = _SPLITS if problem.rows <= _MAX_ROWS_SPLIT else (1,)
    # Fewer inputs a block than 64 leave the loop itself dear.
    inputs = [size for size in (128, 64) if problem.group_size % size == 0] or [32]
    outputs = [size for size in (128, 64) if problem.outputs % size == 0] or [32]
    for stages, row, input_, output, count in itertools.product(
        (3, 4, 5), rows, inputs, outputs, splits
    ):
        if problem.inputs % (count * input_) == 0:
            yield Blocks(row, output, input_, count, _warps(row, output), stages)


def _dividing(size: int, blocks: tuple[int, ...]) -> int | None:
    return next((block for block in blocks if size % block == 0), None)


def _warps(rows: int, outputs: int) -> int:
    return 8 if rows * outputs >= 128 * 128 else 4
