"""How the kernel for compute capability 8.0 divides a product: plain rules, and what is tried.

The rules follow from counts of bytes, instructions and registers. No GPU has confirmed them.
"""

import itertools
from collections.abc import Iterator

from jax.extend import backend

from glm_jax.kernels import target
from glm_jax.kernels.quantized_matmul.arguments import Problem
from glm_jax.kernels.quantized_matmul.mosaic_blocks import Blocks, busiest, give_whole_tiles
from glm_jax.kernels.quantized_matmul.mosaic_layout import TILE

# KiB of a multiprocessor, from a compute capability on; a program takes one more than its own.
_SHARED_MEMORY = {8.0: 164, 8.6: 100, 9.0: 228, 12.0: 100}
_FEW_ROWS = 64  # up to here a tile holds all rows, and groups are scaled after they are summed
_STEP = 2**14  # bytes of weights


def is_for(capability: float) -> bool:
    """Whether the kernel is that of GPUs of a compute capability; later ones have others."""
    return 8.0 <= capability < 9.0


def device() -> tuple[float, int]:
    """Compute capability and multiprocessors of the device that is compiled for."""
    return target.compute_capability(), backend.get_default_device().core_count


def choose(problem: Problem, capability: float, multiprocessors: int) -> Blocks:
    """Return the blocks for a device that nothing was measured on.

    Where rows are few, a step has at most 16 KiB of weights, so that two programs of several
    steps fit into a multiprocessor. Of each two that follow each other the later must keep 10%
    more of the multiprocessors busy: shorter steps take more instructions beside a weight's own.

    Raises:
      ValueError: nothing divides the problem, which `mosaic_blocks.supports` has a reason against.
    """
    ranked = []
    for sizes in _sizes(problem):
        if problem.rows > _FEW_ROWS or sizes[1] * sizes[2] * TILE * problem.bits // 8 <= _STEP:
            ranked += list(_blocks(problem, sizes, (2, 1), capability, multiprocessors))[:1]
    return busiest(problem, ranked, 0.1)


def candidates(problem: Problem, capability: float, multiprocessors: int) -> Iterator[Blocks]:
    """Blocks worth measuring, those first that are expected to be the fastest."""
    for sizes in _sizes(problem):
        yield from _blocks(problem, sizes, (1, 2, 3, 4), capability, multiprocessors)


def _sizes(problem: Problem) -> Iterator[tuple[int, int, int]]:
    """Rows, tiles of 64 outputs and inputs of a step that divide a problem, those first that
    are expected to be the fastest."""
    few = problem.rows <= _FEW_ROWS
    rows = [8 if problem.rows <= 8 else -(-problem.rows // 16) * 16] if few else [128, 64]
    steps = (128, 256, 64) if few else (64,)
    for row, inputs, tiles in itertools.product(rows, steps, (4, 2, 1)):
        # Sums take tiles * row / 2 registers of 255, and as many again where groups are added.
        if tiles * row > (128 if few else 256) or problem.outputs % (TILE * tiles):
            continue
        if problem.inputs % inputs == 0 and problem.has_whole_groups_in(inputs):
            yield row, tiles, inputs


def _blocks(
    problem: Problem,
    sizes: tuple[int, int, int],
    counts: tuple[int, ...],
    capability: float,
    multiprocessors: int,
) -> Iterator[Blocks]:
    """Blocks of four or three stages, of each count of programs that fit a multiprocessor."""
    known = max(name for name in _SHARED_MEMORY if name <= capability)
    rows, tiles, inputs = sizes
    for count in counts:
        memory = 1024 * (_SHARED_MEMORY[known] // count - 1)
        fitting = (s for s in (4, 3) if _shared_bytes(problem, sizes, s) <= memory)
        for stages in itertools.islice(fitting, 1):
            blocks = Blocks(
                rows=rows,
                tiles=tiles,
                consumers=1,
                inputs=inputs,
                stages=stages,
                programs=count * multiprocessors,
                scale_first=problem.rows > _FEW_ROWS,
            )
            yield give_whole_tiles(problem, blocks)


def _shared_bytes(problem: Problem, sizes: tuple[int, int, int], stages: int) -> int:
    """Of a program: each array is rounded up to 1 KiB."""
    rows, tiles, inputs = sizes
    groups = max(1, inputs // problem.group_size)
    of_groups = 4 * groups * TILE * tiles
    of_step = [
        TILE * tiles * inputs * problem.bits // 8,
        2 * rows * inputs,
        of_groups,
        of_groups if problem.zeros else 0,
        4 * groups * rows,
    ]
    return sum(-(-stages * size // 1024) * 1024 for size in of_step)
