"""No weight is copied, sliced or turned to be multiplied: read from the compiled programs."""

import math
import time

import jax
import pytest
from aot.compiling import hardware
from aot.written import written

from glm_jax.config import glm_130b, glm_config
from glm_jax.planning import topology
from glm_jax.planning.engine_programs import abstract_cache, abstract_params, lower_engine
from glm_jax.planning.training_programs import lower_train_step
from glm_jax.sharding import make_mesh
from glm_jax.training.recipe import Recipe

MIB = 2**20
MOVES = {
    "copy",
    "transpose",
    "slice",
    "dynamic-slice",
    "dynamic-update-slice",
    "concatenate",
    "pad",
}
SLOTS, LENGTH = 1, 2048


def _mesh(name, devices):
    return make_mesh((1, 1, devices), topology.devices(hardware(name), devices))


def _pages(name, devices):
    """Shapes of a device's keys and values."""
    cache, _ = abstract_cache(_config(1), _mesh(name, devices), SLOTS, LENGTH)
    return {leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(cache)}


def _config(layers):
    return glm_130b(num_layers=layers).replace(compute_dtype="float16", param_dtype="float16")


def _lowered(name, devices, weights, layers, **limits):
    return lower_engine(
        _config(layers), _mesh(name, devices), weights,
        slots=SLOTS, prefill_width=16, max_length=LENGTH, **limits,
    )  # fmt: skip


def _assert_step_writes_little(text, name, devices):
    """Of 1 MiB or more a step of one slot writes its pages of keys and values, in place, and
    kernels their results: sums of parts of the inputs, and parts of attention."""
    pages = _pages(name, devices)
    others = [w for w in written(text, MIB) if w.shape not in pages]
    assert [w.line for w in others if w.opcode != "custom-call"] == []
    assert all(w.bytes <= 4 * MIB and w.dtype[0] != "s" for w in others), others


@pytest.mark.parametrize(
    ("name", "devices"),
    [
        ("h100", 1),
        ("a100_80gb", 8),
        pytest.param("h100", 8, marks=pytest.mark.slow),
        pytest.param("a100_80gb", 1, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("weights", ["int4", "int4,group=128,zero_point", "int8", None])
def test_a_decode_step_and_a_prefill_copy_no_weight(name, devices, weights):
    lowered = _lowered(name, devices, weights, layers=2)
    _assert_step_writes_little(lowered["step"].compile().as_text(), name, devices)
    # What 16 tokens make is smaller than any weight, but for what kernels sum up afterwards.
    params = abstract_params(_config(1), _mesh(name, devices), weights)
    kernels = [x for x in jax.tree.leaves(params.layers) if x.size > 10**7]
    smallest = min(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in kernels)
    found = written(lowered["prefill"].compile().as_text(), min(smallest, 8 * MIB))
    pages = _pages(name, devices)
    # What multiplies writes its products, or sums of parts of the inputs.
    others = [w for w in found if w.opcode != "custom-call" and "dot" not in w.parts]
    assert [w.line for w in others if w.shape not in pages] == []


@pytest.mark.parametrize("weights", ["int4", None])
def test_blocks_that_stay_beside_streamed_ones_are_not_copied(weights):
    limit = 17.5 if weights is None else 7.0  # the embedding, two in flight, two that stay
    lowered = _lowered("h100", 1, weights, layers=6, weight_memory_limit=limit)
    text = lowered["step"].compile().as_text()
    params = abstract_params(_config(6), _mesh("h100", 1), weights, limit)
    assert params.layers.resident_count == 2
    sizes = {math.prod(x.shape) for x in jax.tree.leaves(params.layers.resident) if x.ndim > 1}
    sizes |= {params.layers.streamed_count * size for size in sizes}
    copies = [w for w in written(text, MIB) if math.prod(w.shape) in sizes]
    # From hosts' memory, which XLA writes as S(5), and by no other way.
    starts = [w for w in copies if w.opcode.endswith("-start")]
    assert starts
    assert all("S(5)" in w.line for w in starts), starts
    assert [w.line for w in copies if not w.opcode.endswith(("-start", "-done"))] == []


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_the_step_of_70_layers_compiles_within_a_minute(devices, capsys):
    began, cpu = time.monotonic(), time.process_time()
    text = _lowered("h100", devices, "int4", layers=70)["step"].compile().as_text()
    taken = time.process_time() - cpu
    with capsys.disabled():
        wall = time.monotonic() - began
        print(f"\n130B INT4 on {devices}: {taken:.0f} s of processor, {wall:.0f} s")
    _assert_step_writes_little(text, "h100", devices)
    assert taken < 60


def test_a_train_step_moves_no_weight_and_no_gradient():
    config = glm_config("1b", num_layers=2, compute_dtype="bfloat16", max_sequence_length=2048)
    lowered = lower_train_step(
        config, Recipe(total_samples=10**6), _mesh("h100", 1),
        accumulation=1, micro_batch=5, sequence_length=2048,
    )  # fmt: skip
    hidden, inner = config.hidden_size, config.inner_hidden_size
    kernels = {3 * hidden**2, hidden**2, 2 * hidden * inner, hidden * inner}
    sizes = kernels | {2 * size for size in kernels} | {config.vocab_size * hidden}
    found = [w for w in written(lowered.compile().as_text(), MIB) if math.prod(w.shape) in sizes]
    assert found  # gradients, and weights in bfloat16
    # A product may turn its operands as it reads them.
    moved = [w for w in found if {w.opcode, *w.parts} & MOVES and "dot" not in w.parts]
    assert [w.line for w in moved] == []
