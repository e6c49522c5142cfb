"""Fine-tuning at 130B: what the table says fits, and no weights written out as floats."""

import math
import re
from pathlib import Path

import pytest
from aot.compiling import hardware

from glm_jax.config import glm_130b
from glm_jax.model import params as glm_params
from glm_jax.model.adapters import AdapterConfig
from glm_jax.planning import finetuning_table, topology, training_programs
from glm_jax.planning.collectives import find_collectives
from glm_jax.planning.engine_programs import abstract_params
from glm_jax.planning.finetuning_table import CASES
from glm_jax.planning.reports import markdown_row
from glm_jax.sharding import make_mesh
from glm_jax.training.recipe import Recipe

ROOT = Path(__file__).parent.parent.parent
GPUS = 8
_FLOATS = {"bf16": 2, "f16": 2, "f32": 4}
# What it says of memory is held against the compiler in every run; five more are slow, that on
# TPUs for it compiles for 88 s of a core.
_CHECKED = [CASES[3]] + [pytest.param(CASES[i], marks=pytest.mark.slow) for i in (0, 8, 9, 13, 14)]


@pytest.mark.parametrize("case", _CHECKED, ids=str)
def test_a_case_fits_as_the_table_says(case):
    """The committed table; regenerate it by `python -m launch.plan --table=finetuning`."""
    described = hardware(case.hardware)
    plan = finetuning_table.plan_case(case, glm_130b(), described)
    assert plan.fits
    text = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
    start = markdown_row(finetuning_table.described_case(case, described))
    [line] = [line for line in text.splitlines() if line.startswith(start)]
    holds, room, waiting, step, _ = (cell.strip() for cell in line[len(start) :].split("|")[:5])
    assert plan.total / 2**30 == pytest.approx(float(holds), rel=0.03, abs=0.15)
    assert plan.room / 2**30 == float(room)
    assert plan.streamed / 2**30 == pytest.approx(float(waiting), rel=0.02, abs=0.05)
    assert plan.roofline.seconds == pytest.approx(float(step.split()[0]), rel=0.02, abs=0.01)


def _adapted(quantization, length, rank, device="a100_40gb", gpus=GPUS, layers=70):
    """A train step of a row beside weights of a kind, by default on 8 A100 of 40 GB."""
    mesh = make_mesh((1, 1, gpus), topology.devices(hardware(device), gpus))
    model = glm_130b(param_dtype="bfloat16", compute_dtype="bfloat16", num_layers=layers)
    recipe = Recipe(
        total_samples=1000,
        dropout=0.0,
        attention_dropout=0.0,
        remat="blocks",
        adapter=AdapterConfig(rank=rank, dropout=0.05),
    )
    lowered = training_programs.lower_train_step(
        model,
        recipe,
        mesh,
        accumulation=1,
        micro_batch=1,
        sequence_length=length,
        frozen=abstract_params(model, mesh, quantization, is_stacked=True),
    )
    return model, lowered.compile()


@pytest.mark.parametrize("quantization", ["int4", "int8"])
def test_no_weight_matrix_is_written_out_as_floats(quantization, capsys):
    """With 16 tokens and rank 1 little else is there: all that a step takes besides what goes
    in, slices of the integers among it, is less than a block in bfloat16, with INT4 less than a
    kernel; and no array of floats is as large as the smallest kernel."""
    model, compiled = _adapted(quantization, 16, 1)
    taken = training_programs.memory(compiled)
    numbers = _numbers(model)
    with capsys.disabled():
        print(
            f"\n130B, {quantization}, adapters of rank 1, a row of 16 tokens: temporaries "
            f"{taken.temporaries / 2**20:.0f} MiB a device; the largest kernel in bfloat16 "
            f"{2 * max(numbers.values()) / 2**20:.0f} MiB"
        )
    assert taken.temporaries < 2 * sum(numbers.values())
    if quantization == "int4":
        assert taken.temporaries < 2 * max(numbers.values())
    assert _largest_floats(model, compiled) < min(numbers.values())


def test_on_a_hopper_the_kernels_run_forward_and_backward():
    """Of a stack in their layout. The backward pass converts tiles, of each of the four linears,
    and there too no array of floats is as large as the smallest kernel."""
    model, compiled = _adapted("int4", 16, 1, "h100", 1, layers=2)
    calls = [line for line in compiled.as_text().splitlines() if '"mosaic_gpu_v2"' in line]
    conversions = [line for line in calls if "/convert_int4/" in line]
    assert len(conversions) == 4
    assert all("transpose(jvp" in line for line in conversions)
    assert sum("/quantized_matmul_int4/" in line for line in calls) >= 4
    assert _largest_floats(model, compiled, 1) < min(_numbers(model, 1).values())


def _numbers(model, gpus=GPUS):
    """How many numbers of a layer's kernels a device has, by name."""
    specs = glm_params.specs(model).layers
    return {
        name: math.prod(getattr(specs, name).kernel.shape[1:]) // gpus
        for name in glm_params.LINEAR_NAMES
    }


def _largest_floats(model, compiled, gpus=GPUS):
    """Numbers of the largest array of floats in a program but the embedding, which is floats."""
    table = model.vocab_size // gpus * model.hidden_size
    largest = 0
    for kind, shape in re.findall(r" = (bf16|f16|f32)\[([\d,]+)\]", compiled.as_text()):
        assert kind in _FLOATS
        size = math.prod(map(int, shape.split(",")))
        if size != table:
            largest = max(largest, size)
    return largest


def test_a_block_sums_twice_forward_and_twice_backward():
    """As products of floats do: rows are gathered before a product, and sums after it scattered,
    all in bfloat16. What adapters sum besides is their rank's, and weights do not move."""
    length = 1024
    model, compiled = _adapted("int4", length, 16)
    found = find_collectives(compiled.as_text(), model.num_layers)
    hidden = length * model.hidden_size * 2
    # A scattered sum's result is a device's part; sums of a rank may travel in one with others.
    summed = lambda e: e.bytes * (GPUS if e.kind == "reduce-scatter" else 1)
    large = [e for e in found if summed(e) >= hidden]
    assert all(summed(e) < 1.01 * hidden for e in large), large  # none in float32
    times = lambda kind: sum(e.times for e in large if e.kind == kind)
    assert {e.kind for e in large} == {"reduce-scatter", "all-gather"}
    # Forward two sums, attention's again for the backward pass, and two of that; and around the
    # blocks where tokens are looked up and where logits' gradients come from.
    assert times("reduce-scatter") == 5 * model.num_layers + 2
    # What products take: two forward, again for the backward pass, and two gradients.
    assert times("all-gather") == 6 * model.num_layers + 1
    small = sum(e.times * e.bytes for e in found if summed(e) < hidden)
    assert small < 0.1 * sum(e.times * e.bytes for e in large)
