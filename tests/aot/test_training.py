"""The 130B train step at the paper's scale fits 96 hosts of 8 A100 of 40 GB."""

import math
import os
import re

import pytest
from aot import schedule
from aot.compiling import collectives, hardware

from configs import glm_130b
from glm_jax.config import glm_config
from glm_jax.planning import topology, training_programs
from glm_jax.planning.collectives import find_collectives, traffic
from glm_jax.sharding import make_mesh
from glm_jax.training import config as train_config
from glm_jax.training.recipe import Recipe
from glm_jax.training.step import compiled_train_step

HOSTS, GPUS = 96, 8
HIDDEN = 12288
ROWS = 1056 // HOSTS * 2048 * HIDDEN  # numbers in a host's rows between blocks


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


def test_the_state_is_gathered_a_kernel_at_a_time_in_float16(compiled):
    """And so is the embedding; besides only the activations of a host's rows are gathered."""
    gathered = _results(compiled, "all-gather")
    assert gathered
    assert {dtype for dtype, size in gathered if size > 8 * HIDDEN} == {"f16"}  # not vectors
    kernel, table = 8 * HIDDEN**2 // GPUS, 150528 * HIDDEN // GPUS
    assert max(size for _, size in gathered if size != ROWS) <= max(kernel, table)


def test_a_block_gathers_and_scatters_rows_twice_each_way(compiled):
    """Forward two gathers before products and two scattered sums after them; backward the same,
    and again what is not saved: both gathers and attention's sum. No sum is whole, in no dtype but
    the products', but that of the logits' gradients a chunk at a time."""
    model = train_config.model_config(glm_130b.get_config())
    accumulation = train_config.batch_schedule(glm_130b.get_config()).accumulation(10**9)
    found = find_collectives(compiled.as_text(), model.num_layers)
    times = lambda kind, size: sum(e.times for e in found if (e.kind, e.bytes) == (kind, 2 * size))
    # Around the blocks: where tokens are looked up, and hidden states at the end.
    assert times("all-gather", ROWS) == accumulation * (6 * model.num_layers + 2)
    assert times("reduce-scatter", ROWS // GPUS) == accumulation * (5 * model.num_layers + 1)
    whole = _results(compiled, "all-reduce")
    chunk = train_config.recipe(glm_130b.get_config()).loss_chunk * HIDDEN
    assert {dtype for dtype, size in whole if size > chunk // 2} == {"f16"}
    assert max(size for _, size in whole) <= chunk


def test_gradients_of_weights_are_scattered_in_float32(compiled):
    """As docs/training.md says why: of all that is scattered only rows are not."""
    scattered = _results(compiled, "reduce-scatter")
    assert {dtype for dtype, size in scattered if size not in (ROWS, ROWS // GPUS)} == {"f32"}


def test_the_next_layers_weights_are_gathered_beside_products(compiled, capsys):
    """By the program's order a step waits for rows within hosts and for gradients, and hardly for
    weights."""
    a100, model = hardware("a100_40gb"), train_config.model_config(glm_130b.get_config())
    text = compiled.as_text()
    found = find_collectives(text, model.num_layers)
    is_weight = lambda e: e.kind == "all-gather" and len(e.group) == HOSTS
    sent = lambda kept: traffic(kept, HOSTS * GPUS, GPUS)
    weights = sent(filter(is_weight, found)).network / a100.network_bandwidth
    others = sent(e for e in found if not is_weight(e))
    waited = others.network / a100.network_bandwidth + others.link / a100.link_bandwidth
    times = schedule.times(text, a100, HOSTS * GPUS, turns=2048 // 256)
    with capsys.disabled():
        print(
            f"\n130B train step by its schedule: {times.now:.1f} s, {times.products:.1f} of "
            f"products, {times.waiting:.1f} that none runs beside; weights take {weights:.1f} s of "
            f"the network, gradients and rows {waited:.1f} of network and links"
        )
    assert times.waiting < waited + 0.2 * weights


def _results(compiled, kind):
    """dtype and number of elements of each array that a program's collectives of a kind give."""
    lines = re.findall(rf"= (\S+|\(.*?\)) {kind}(?:-start)?\(", compiled.as_text())
    arrays = [array for line in lines for array in re.findall(r"(\w+)\[([\d,]+)\]", line)]
    return [(dtype, math.prod(map(int, sizes.split(",")))) for dtype, sizes in arrays]


def _step_of_1b(num_layers, length=1024, gpus=1, kind="h100", **fields):
    """A step of the 1B with a number of layers, weights divided over the GPUs, 8 rows each."""
    model = glm_config("1b", compute_dtype="bfloat16").replace(num_layers=num_layers)
    return training_programs.lower_train_step(
        model,
        Recipe(total_samples=1, dropout=0.0, attention_dropout=0.0, **fields),
        make_mesh((1, gpus, 1), topology.devices(hardware(kind), gpus)),
        accumulation=1,
        micro_batch=8 * gpus,
        sequence_length=length,
    ).compile()


def test_the_weights_of_a_layer_are_gathered_at_once(monkeypatch):
    """Of the linears whose inputs are there: more than XLA combines by its own threshold."""
    gathers = {}
    for is_ours in (True, False):
        if not is_ours:  # the environment names XLA's own
            threshold = f"--xla_gpu_all_gather_combine_threshold_bytes={30 * 2**20 + 7}"
            monkeypatch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} {threshold}")
        compiled_train_step.cache_clear()
        compiled = _step_of_1b(2, gpus=GPUS, kind="a100_40gb", remat="dots")
        gathers[is_ours] = collectives(compiled)["all-gather"]
    # The same bytes; two layers each way, and the embedding for lookup and logits.
    assert gathers[True][1] == gathers[False][1]
    assert gathers[True][0] <= 2 * 2 + 2 < gathers[False][0]


def test_float8_products_are_the_librarys():
    """Three of each linear, one forward and two backward; those of logits are bfloat16."""
    text = _step_of_1b(1, matmul_precision="float8").as_text()
    assert text.count('custom_call_target="__cublas$lt$matmul$f8"') == 3 * 4
    others = re.findall(r"= \((\w+)\[([\d,]+)\].*cublas\$lt\$matmul\"", text)
    assert len(others) == 3


@pytest.mark.slow
def test_results_wait_on_hosts():
    """All of a layer that the backward pass needs, but for its input: the 1B takes less than
    docs/training.md says of any other remat that computes no product again."""
    model, length = glm_config("1b"), 2048
    taken = training_programs.memory(_step_of_1b(model.num_layers, length, remat="offload"))
    # In bfloat16 of a token: q, k, v, attention's result, the first linear of the feed-forward.
    numbers = 4 * model.hidden_size + 2 * model.inner_hidden_size
    assert taken.on_host > 2 * model.num_layers * 8 * length * numbers
    assert taken.total < 21 * 2**30  # "dots" 28.7


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


def test_results_wait_on_hosts_of_tpus():
    """Of a mesh of four chips, in a loop over the layers; as much as the backward pass needs."""
    model = glm_config("tiny", compute_dtype="bfloat16")
    rows, length, tensor = 4, 128, 2
    lowered = training_programs.lower_train_step(
        model,
        Recipe(total_samples=1, dropout=0.0, attention_dropout=0.0, remat="offload"),
        make_mesh((1, 2, tensor), topology.devices(hardware("tpu_v5e"), 2 * tensor)),
        accumulation=1,
        micro_batch=2 * rows,
        sequence_length=length,
    )
    numbers = 4 * model.hidden_size + 2 * model.inner_hidden_size  # as above
    needed = 2 * model.num_layers * rows * length * numbers // tensor
    assert training_programs.memory(lowered.compile()).on_host > needed
