"""The 130B train step at the paper's scale fits 96 hosts of 8 A100 of 40 GB."""

import re

import pytest
from aot.compiling import collectives, hardware

from configs import glm_130b
from glm_jax.config import glm_config
from glm_jax.planning import topology, training_programs
from glm_jax.planning.collectives import parse_collectives
from glm_jax.sharding import make_mesh
from glm_jax.training import config as train_config
from glm_jax.training.recipe import Recipe

HOSTS, GPUS = 96, 8


@pytest.fixture(scope="module")
def compiled():
    a100 = hardware("a100_40gb")
    devices = topology.devices(a100, HOSTS * GPUS, HOSTS)
    config = glm_130b.get_config()
    config.mesh = ",".join(map(str, (1, HOSTS, GPUS)))
    schedule = train_config.batch_schedule(config)
    assert schedule.final == 4224
    lowered = training_programs.lower_train_step(
        train_config.model_config(config),
        train_config.recipe(config),
        make_mesh((1, HOSTS, GPUS), devices),
        accumulation=schedule.accumulation(10**9),
        micro_batch=schedule.micro_batch,
        sequence_length=config.data.sequence_length,
    )
    return lowered.compile()


def test_the_papers_step_fits(compiled, capsys):
    taken = training_programs.memory(compiled)
    room = hardware("a100_40gb").memory_bytes
    with capsys.disabled():
        print(f"\n130B train step, 96 x 8 A100 40 GB, GiB a device of {room / 2**30:.0f}:")
        print(
            f"  state and batch {taken.arguments / 2**30:.2f}, of it given back "
            f"{taken.reused / 2**30:.2f}, temporaries {taken.temporaries / 2**30:.2f}, "
            f"together {taken.total / 2**30:.2f}"
        )
        for kind, (count, size) in collectives(compiled).items():
            print(f"  {kind}: {count} in the text, {size / 2**20:.0f} MiB a device")
    assert taken.total < 0.9 * room
    # Parameters and both moments in float32, on 768 devices, and little that is not split.
    state = 3 * 4 * 128_697_794_560 / (HOSTS * GPUS)
    assert state < taken.arguments < 1.05 * state
    assert taken.reused > 0.99 * state


def test_the_state_is_gathered_a_layer_at_a_time(compiled):
    """No gather's result is larger than a layer's weights in float16, the embedding in float32, or
    the activations of a host's rows, which its GPUs divide between blocks."""
    layer = 2 * 12 * 12288**2 / GPUS
    table = 4 * 150528 * 12288 / GPUS
    rows = 2 * glm_130b.get_config().data.micro_batch_size / HOSTS * 2048 * 12288
    parsed = parse_collectives(compiled.as_text().splitlines())
    gathers = [collective.bytes for collective in parsed if collective.kind == "all-gather"]
    assert gathers
    assert max(gathers) <= max(layer, table, rows), sorted(gathers)


def test_what_a_step_on_one_gpu_writes():
    """Two layers of the 1B, 8 rows: attention is not computed twice, and products come out in
    bfloat16."""
    model = glm_config("1b", compute_dtype="bfloat16").replace(num_layers=2)
    recipe = Recipe(total_samples=1, attention_dropout=0.0, remat="dots")
    rows, length = 8, 1024
    lowered = training_programs.lower_train_step(
        model,
        recipe,
        make_mesh((1, 1, 1), topology.devices(hardware("h100"))),
        accumulation=1,
        micro_batch=rows,
        sequence_length=length,
    )
    text = lowered.compile().as_text()
    assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 2 * model.num_layers
    products = re.findall(r"= \((\w+)\[(\d+),\d+\]\S+ \S+ custom-call\(.*cublas", text)
    of_tokens = [dtype for dtype, outputs in products if int(outputs) == rows * length]
    assert len(of_tokens) == 8 * model.num_layers
    assert set(of_tokens) == {"bf16"}
