"""A train step equals the CPU's in float32, is near it in bfloat16, and its state is saved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.config import GLMConfig
from glm_jax.sharding import make_mesh
from glm_jax.training.checkpoints import RunCheckpoints
from glm_jax.training.recipe import Recipe
from glm_jax.training.state import TrainBatch, init_state, saved_form
from glm_jax.training.step import compiled_train_step

pytestmark = pytest.mark.gpu
IS_GPU = jax.default_backend() == "gpu"
LENGTH = 256 if IS_GPU else 16
SIZES = (2, 512, 1408, 4, 1024, LENGTH) if IS_GPU else (1, 32, 64, 2, 96, LENGTH)


def _batch():
    rng, shape = np.random.default_rng(0), (1, 2, LENGTH)
    tokens = rng.integers(0, 90, shape).astype(np.int32)
    first = np.arange(LENGTH) < 3 * LENGTH // 4  # two texts in a row
    everywhere = lambda x: np.broadcast_to(x, shape)
    # Not committed to a device: they go to that of the mesh.
    return TrainBatch(
        tokens=jnp.asarray(tokens),
        targets=jnp.asarray(np.roll(tokens, -1, axis=-1)),
        loss_weights=jnp.ones(shape, jnp.float32),
        position_ids=jnp.asarray(everywhere(np.arange(LENGTH, dtype=np.int32))),
        context_length=jnp.asarray(everywhere(np.where(first, LENGTH // 2, 4)), jnp.int32),
        segment_ids=jnp.asarray(everywhere(np.where(first, 1, 2)), jnp.int32),
        groups=jnp.zeros(shape, jnp.int32),
    )


def _run(device, dtype="float32", **fields):
    """Losses of three steps, and the parameters after them."""
    recipe = Recipe(
        total_samples=1000,
        learning_rate=1e-3,
        warmup_fraction=0.0,
        dropout=0.0,
        attention_dropout=0.0,
        **fields,
    )
    model, mesh = GLMConfig(*SIZES, compute_dtype=dtype), make_mesh((1, 1, 1), [device])
    state = init_state(model, recipe, jax.random.key(0), mesh)
    step = compiled_train_step(model, recipe, 1, mesh)
    batch, losses = _batch(), []
    with jax.set_mesh(mesh):
        for number in range(3):
            state, metrics = step(state, None, batch, jax.random.key(number))
            losses.append(float(metrics["loss"]))
    return losses, jax.tree.map(np.asarray, saved_form(state).params)


@pytest.fixture(scope="module")
def on_cpu():
    return _run(jax.devices("cpu")[0])


def test_float32_equals_the_cpus(on_cpu):
    losses, params = _run(jax.devices()[0])
    np.testing.assert_allclose(losses, on_cpu[0], rtol=2e-5)
    assert losses[2] < losses[0]
    # Adam's first steps go by the gradient's sign: where it is near zero, the sign is chance.
    off = jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b) > 1e-5, params, on_cpu[1]))
    assert sum(x.sum() for x in off) < 1e-3 * sum(x.size for x in off)


# On CPU tests/training has both: there this file shows that it runs.
@pytest.mark.parametrize(
    "fields",
    [{"dtype": "bfloat16"}, {"moments": "int8", "offload_moments": True}] if IS_GPU else [],
    ids=str,
)
def test_few_bits_and_moments_on_the_host_descend_alike(on_cpu, fields):
    losses, _ = _run(jax.devices()[0], **fields)
    np.testing.assert_allclose(losses, on_cpu[0], rtol=2e-2)


def test_a_state_comes_back_from_its_checkpoint(tmp_path):
    """On a GPU by way of the host's pinned memory, where layers are stacked."""
    recipe, model = Recipe(total_samples=10), GLMConfig(*SIZES)
    mesh = make_mesh((1, 1, 1), jax.devices()[:1])
    state = init_state(model, recipe, jax.random.key(0), mesh)
    checkpoints = RunCheckpoints(tmp_path / "checkpoints", 1, 0.0, 1, 0)
    try:
        checkpoints.save(1, state, {"consumed": 3})
        restored, data = checkpoints.restore_latest(model, recipe, mesh)
    finally:
        checkpoints.close()
    assert data == {"consumed": 3}
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    of_leaves = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
    assert of_leaves(restored) == of_leaves(state)
