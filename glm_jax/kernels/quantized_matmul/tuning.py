"""Block sizes of the Triton kernel, by a model of bytes and occupancy while a product is traced."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

ROW_BUCKETS = (16, 32, 64, 128, 512)  # problems of as many rows share block sizes
# Seconds from asking memory to the answer; sets how many bytes must be under way.
_LATENCY = 700e-9
_L2_TO_MEMORY = 3.0  # how much faster L2 hands out what several blocks read
_MAX_REGISTERS = 200  # a thread; beyond that the compiler begins to spill
_REGISTERS = 2**16  # of a multiprocessor
_LAUNCH = 3e-6  # seconds of a further pass, which sums what split programs wrote


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


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What the model needs to know of a GPU: bytes, bytes and operations per second."""

    multiprocessors: int
    memory_bandwidth: float
    matrix_flops: float
    shared_memory: int
    shared_memory_per_block: int
    threads: int


# By compute capability, as configs/hardware has them: an A100 80GB, an RTX 3090, an H100.
GPUS = {
    8.0: Gpu(108, 2039e9, 312e12, 167936, 166912, 2048),
    8.6: Gpu(82, 936e9, 71e12, 102400, 101376, 1536),
    9.0: Gpu(132, 3350e9, 989e12, 233472, 232448, 2048),
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """Rows of x, inputs and outputs of the weight, inputs of a group, bits."""

    rows: int
    inputs: int
    outputs: int
    group_size: int
    bits: int


def row_bucket(rows: int) -> int:
    """Return the first bucket that the rows fit into, else the last."""
    return next((bucket for bucket in ROW_BUCKETS if rows <= bucket), ROW_BUCKETS[-1])


def estimate(problem: Problem, blocks: Blocks, gpu: Gpu) -> float:
    """Estimate a product's seconds; infinite where the blocks do not fit the GPU."""
    threads = 32 * blocks.warps
    packed = blocks.inputs * blocks.outputs * problem.bits // 8
    stage = packed + 2 * blocks.rows * blocks.inputs
    shared = stage * (blocks.stages - 1)
    unpacked = 2 * blocks.inputs * blocks.outputs
    # Sums, the unpacked block and x in registers, and what addresses take.
    numbers = 4 * blocks.rows * blocks.outputs + unpacked + 2 * blocks.rows * blocks.inputs
    registers = numbers / 4 / threads + 40
    if shared > gpu.shared_memory_per_block or registers > _MAX_REGISTERS:
        return float("inf")
    resident = int(
        min(
            gpu.shared_memory // max(shared, 1),
            gpu.threads // threads,
            _REGISTERS // (threads * registers),
        )
    )
    if resident < 1:
        return float("inf")
    row_blocks = -(-problem.rows // blocks.rows)
    programs = row_blocks * (problem.outputs // blocks.outputs) * blocks.splits
    slots = gpu.multiprocessors * resident
    filled = programs / (-(-programs // slots) * slots)
    in_flight = min(programs, slots) * shared
    reach = min(1.0, in_flight / (_LATENCY * gpu.memory_bandwidth))
    weight = problem.inputs * problem.outputs * problem.bits / 8
    x = 2.0 * problem.rows * problem.inputs * (problem.outputs // blocks.outputs)
    partial = 8.0 * problem.rows * problem.outputs * blocks.splits
    moved = weight + (weight * (row_blocks - 1) + x + partial) / _L2_TO_MEMORY
    flops = 2.0 * row_blocks * blocks.rows * problem.inputs * problem.outputs
    # Fewer than 64 rows a block leave matrix units waiting for unpacking.
    rate = gpu.matrix_flops * min(1.0, blocks.rows / 64)
    seconds = max(moved / (gpu.memory_bandwidth * reach), flops / rate) / filled
    return seconds + (_LAUNCH if blocks.splits > 1 else 0.0)


def candidates(problem: Problem) -> Iterator[Blocks]:
    """Return block sizes that divide the problem; Triton takes powers of two alone."""
    rows = (16,) if problem.rows <= 16 else (32,) if problem.rows <= 32 else (64, 128)
    # Fewer inputs a block than 64 leave the loop itself dear.
    inputs = [size for size in (64, 128) if problem.group_size % size == 0]
    if not inputs and problem.group_size % 32 == 0:
        inputs = [32]
    outputs = [size for size in (32, 64, 128) if problem.outputs % size == 0]
    for row, output, input_, splits in itertools.product(rows, outputs, inputs, (1, 2, 4, 8, 16)):
        # A split takes whole blocks, and a block whole or part of one group.
        if problem.inputs % (splits * input_) or (problem.rows > 32 and splits > 1):
            continue
        warps = 8 if row * output >= 128 * 128 else 4
        for stages in (3, 4, 5):
            yield Blocks(row, output, input_, splits, warps, stages)


def choose(problem: Problem, gpu: Gpu) -> Blocks | None:
    """Return the blocks of least estimated time; None where none fit the problem."""
    timed = [(estimate(problem, blocks, gpu), blocks) for blocks in candidates(problem)]
    timed = [pair for pair in timed if pair[0] < float("inf")]
    return min(timed, key=lambda pair: pair[0])[1] if timed else None


@functools.cache
def blocks_for(problem: Problem, compute_capability: float) -> Blocks | None:
    """Choose blocks for a problem on the known GPU that is nearest from below.

    Args:
      compute_capability: such as 8.6.
    """
    known = max((name for name in GPUS if name <= compute_capability), default=min(GPUS))
    return choose(dataclasses.replace(problem, rows=row_bucket(problem.rows)), GPUS[known])
