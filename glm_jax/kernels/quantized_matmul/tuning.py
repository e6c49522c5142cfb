"""Block sizes of the GPU kernel: a model of bytes and occupancy, and its results as data.

`blocks.json` lists what `choose` returns for the shapes of GLM-130B, and the figures of the
GPUs that it used, with which it answers for other shapes when they are traced.
`launch/tune.py` writes the file.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator
from importlib import resources

FILE = "blocks.json"
ROW_BUCKETS = (16, 32, 64, 128, 512)  # problems of as many rows share block sizes
# Seconds from asking memory to the answer; sets how many bytes must be under way.
_LATENCY = 700e-9
_L2_TO_MEMORY = 3.0  # how much faster L2 hands out what several blocks read
_MOST_REGISTERS = 200  # a thread; beyond that the compiler begins to spill
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
    """What the model needs to know of a GPU. Bytes, seconds, operations per second."""

    multiprocessors: int
    memory_bandwidth: float
    matrix_flops: float
    shared_memory: int
    shared_memory_per_block: int
    threads: int
    registers: int


@dataclasses.dataclass(frozen=True)
class Problem:
    """Rows of x, inputs and outputs of the weight, inputs of a group, bits."""

    rows: int
    inputs: int
    outputs: int
    group_size: int
    bits: int


def row_bucket(rows: int) -> int:
    """The first bucket that holds so many rows, else the last."""
    return next((bucket for bucket in ROW_BUCKETS if rows <= bucket), ROW_BUCKETS[-1])


def estimate(problem: Problem, blocks: Blocks, gpu: Gpu) -> float:
    """Seconds that a product should take; infinite where the blocks do not fit the GPU."""
    threads = 32 * blocks.warps
    packed = blocks.inputs * blocks.outputs * problem.bits // 8
    stage = packed + 2 * blocks.rows * blocks.inputs
    shared = stage * (blocks.stages - 1)
    unpacked = 2 * blocks.inputs * blocks.outputs
    # Sums, the unpacked block and x in registers, and what addresses take.
    numbers = 4 * blocks.rows * blocks.outputs + unpacked + 2 * blocks.rows * blocks.inputs
    registers = numbers / 4 / threads + 40
    if shared > gpu.shared_memory_per_block or registers > _MOST_REGISTERS:
        return float("inf")
    resident = int(
        min(
            gpu.shared_memory // max(shared, 1),
            gpu.threads // threads,
            gpu.registers // (threads * registers),
        )
    )
    if resident < 1:
        return float("inf")
    row_blocks = -(-problem.rows // blocks.rows)
    programs = row_blocks * (problem.outputs // blocks.outputs) * blocks.splits
    places = gpu.multiprocessors * resident
    filled = programs / (-(-programs // places) * places)
    under_way = min(programs, places) * shared
    reach = min(1.0, under_way / (_LATENCY * gpu.memory_bandwidth))
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
    """Block sizes that divide the problem; Triton takes powers of two alone."""
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
    """The blocks of least estimated time, None where none fit the problem."""
    timed = [(estimate(problem, blocks, gpu), blocks) for blocks in candidates(problem)]
    timed = [pair for pair in timed if pair[0] < float("inf")]
    return min(timed, key=lambda pair: pair[0])[1] if timed else None


def lookup(problem: Problem, compute_capability: float) -> Blocks | None:
    """Blocks for a problem: from the table, else from the model."""
    gpus, table = _load()
    known = [name for name in gpus if float(name) <= compute_capability] or [min(gpus)]
    name = max(known, key=float)
    problem = dataclasses.replace(problem, rows=row_bucket(problem.rows))
    key = table_key(name, problem)
    if key in table:
        return table[key]
    return choose(problem, gpus[name])


def table_key(capability: str, problem: Problem) -> str:
    return ",".join((capability, *map(str, dataclasses.astuple(problem))))


@functools.cache
def _load() -> tuple[dict[str, Gpu], dict[str, Blocks]]:
    content = json.loads(resources.files(__package__).joinpath(FILE).read_text(encoding="utf-8"))
    gpus = {name: Gpu(**figures) for name, figures in content["gpus"].items()}
    return gpus, {key: Blocks(*sizes) for key, sizes in content["blocks"].items()}
