"""One step: its loss and gradient equal the formula's, and what is not to be trusted is
skipped."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glm_jax.config import GLMConfig
from glm_jax.model import glm, prefetched_layers
from glm_jax.model import params as glm_params
from glm_jax.model.layer_stacks import stack_layers
from glm_jax.model.layers import Dropout, drop
from glm_jax.model.streamed_layers import HOST_MEMORY
from glm_jax.model.training import REMAT_POLICIES, embed_rows
from glm_jax.model.visibility import Visibility
from glm_jax.sharding import activation_sharding, make_mesh
from glm_jax.training import state as training_state
from glm_jax.training import step as training_step
from glm_jax.training.loss import cross_entropy
from glm_jax.training.recipe import Recipe
from glm_jax.training.stability import embedding_factor, init_monitor, judge
from glm_jax.training.state import (
    TrainBatch,
    abstract_saved_state,
    abstract_state,
    init_state,
    saved_form,
    step_form,
)
from glm_jax.training.step import compiled_train_step, loss_sums

CONFIG = GLMConfig(2, 32, 64, 4, 96, 32)
PLAIN = Recipe(
    total_samples=1000, dropout=0.0, attention_dropout=0.0, embedding_gradient=1.0, loss_chunk=8
)


def _batch(accumulation=1, rows=2, length=32, seed=0):
    rng = np.random.default_rng(seed)
    shape = (accumulation, rows, length)
    segments = np.broadcast_to(np.array([1] * 20 + [2] * 10 + [0] * 2), shape)
    contexts = np.broadcast_to(np.array([7] * 20 + [3] * 10 + [0] * 2), shape)
    return TrainBatch(
        tokens=jnp.asarray(rng.integers(0, 96, shape), jnp.int32),
        targets=jnp.asarray(rng.integers(0, 96, shape), jnp.int32),
        loss_weights=jnp.asarray((rng.random(shape) < 0.5) & (segments > 0), jnp.float32),
        position_ids=jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), shape),
        context_length=jnp.asarray(contexts, jnp.int32),
        segment_ids=jnp.asarray(segments, jnp.int32),
        groups=jnp.asarray(rng.integers(0, 3, shape), jnp.int32),
    )


def _part(batch):
    return jax.tree.map(lambda x: x[0], batch)


def _formula(params, batch, config=CONFIG):
    """Mean cross-entropy over all logits at once."""
    visibility = Visibility.packed(batch.segment_ids, batch.context_length)
    logits = glm.forward(params, config, batch.tokens, batch.position_ids, visibility)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    return jnp.sum(losses * batch.loss_weights) / jnp.sum(batch.loss_weights)


@pytest.fixture(scope="module")
def params():
    return glm_params.init(CONFIG, jax.random.key(0))


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [4, 8, 7])  # 7: in threes, with padding
def test_cross_entropy_and_gradients_equal_the_formula(chunk, z_loss):
    draws = jax.random.split(jax.random.key(1), 4)
    hidden = 3 * jax.random.normal(draws[0], (2, 16, 12))
    table = jax.random.normal(draws[1], (40, 12))
    targets = jax.random.randint(draws[2], (2, 16), 0, 40)
    weights = jax.random.uniform(draws[3], (2, 16))

    def formula(hidden, table):
        logits = jnp.einsum("bse,ve->bsv", hidden, table, precision="highest")
        log_sum = jax.nn.logsumexp(logits, axis=-1)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.sum(weights * (losses + z_loss * log_sum**2)) * 7, losses

    def ours(hidden, table):
        total, (losses, _) = cross_entropy(hidden, table, targets, weights, chunk, z_loss)
        return total * 7, losses

    grad = lambda f: jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))
    (total, losses), gradients = grad(ours)(hidden, table)
    (expected_total, expected_losses), expected = grad(formula)(hidden, table)
    np.testing.assert_allclose(total, expected_total, rtol=1e-5)
    np.testing.assert_allclose(losses, expected_losses, atol=1e-5)
    for got, wanted in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-4)


def test_all_logits_never_exist_at_once():
    shape, vocab, chunk = (2, 1024, 16), 8192, 64
    hidden = jax.ShapeDtypeStruct(shape, jnp.float32)
    table = jax.ShapeDtypeStruct((vocab, 16), jnp.float32)
    targets = jax.ShapeDtypeStruct(shape[:2], jnp.int32)
    weights = jax.ShapeDtypeStruct(shape[:2], jnp.float32)
    gradient = jax.grad(lambda *a: cross_entropy(*a, chunk, 0.0)[0], argnums=(0, 1))
    compiled = jax.jit(gradient).lower(hidden, table, targets, weights).compile()
    whole = 4 * 2 * 1024 * vocab
    assert compiled.memory_analysis().temp_size_in_bytes < whole / 4


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_gradients_equal_the_formula_whatever_is_rematerialised(params, remat):
    batch = _part(_batch())
    recipe = Recipe(total_samples=1, loss_chunk=8, remat=remat)

    def ours(params):
        total, sums = loss_sums(params, CONFIG, batch, recipe, 3)
        return total / jnp.sum(batch.loss_weights), sums

    (loss, sums), gradients = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
    expected_loss, expected = jax.jit(jax.value_and_grad(_formula))(params, batch)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6 + 1e-5 * float(abs(b).max())),
        gradients,
        expected,
    )
    np.testing.assert_allclose(sums["group_losses"].sum(), sums["loss"], rtol=1e-5)
    assert sums["group_counts"].sum() == batch.loss_weights.sum()


def test_the_backward_pass_runs_no_product_again_whose_result_is_saved(params):
    """Results are saved once rounded, half of their size in float32."""
    batch = _part(_batch())
    config = CONFIG.replace(compute_dtype="bfloat16")

    def products(remat):
        recipe = Recipe(total_samples=1, loss_chunk=8, attention="blockwise", remat=remat)
        loss = lambda params: loss_sums(params, config, batch, recipe, 3)[0]
        return str(jax.make_jaxpr(jax.grad(loss))(params)).count("dot_general[")

    counts = {remat: products(remat) for remat in REMAT_POLICIES}
    once = counts["none"]
    # Again: three linears and two products of attention, in the one function of all layers.
    again = {"none": 0, "dots": 0, "offload": 0, "attention": 3, "blocks": 5}
    assert counts == {remat: once + more for remat, more in again.items()}

    recipe = dataclasses.replace(PLAIN, remat="dots", attention="blockwise")
    loss = lambda params: loss_sums(params, config, batch, recipe, 3)[0]
    saved = jax.tree.leaves(jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params))
    of_block = lambda shape: [x.dtype.name for x in saved if x.shape == shape]
    assert set(of_block((2, 32, 2, CONFIG.inner_hidden_size))) == {"bfloat16"}


def test_packed_equals_alone(params):
    """Two texts in a row give the losses that each gives in a row of its own."""
    batch = _part(_batch(rows=1))
    together = loss_sums(params, CONFIG, batch, PLAIN, 3)[1]["loss"]
    alone = 0.0
    for segment in (1, 2):
        is_own = batch.segment_ids == segment
        first = int(jnp.argmax(is_own[0]))
        move = lambda x, first=first: jnp.roll(x, -first, axis=1)
        part = jax.tree.map(move, batch)
        own = move(is_own)
        part = part.replace(loss_weights=part.loss_weights * own, segment_ids=jnp.where(own, 1, 0))
        alone += loss_sums(params, CONFIG, part, PLAIN, 3)[1]["loss"]
    np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_gradients_of_a_token_that_is_often_there_are_summed_in_the_tables_dtype():
    """In bfloat16 a sum of ones stands still at 256."""
    tokens = jnp.zeros((1, 1000), jnp.int32)
    total = lambda table: embed_rows(table, tokens, "bfloat16").astype(jnp.float32).sum()
    gradient = jax.grad(total)(jnp.ones((3, 2)))
    np.testing.assert_array_equal(gradient, [[1000, 1000], [0, 0], [0, 0]])


def test_loss_counts_targets_alone(params):
    batch = _part(_batch())
    loss = loss_sums(params, CONFIG, batch, PLAIN, 3)[1]["loss"]
    elsewhere = batch.replace(targets=jnp.where(batch.loss_weights > 0, batch.targets, 7))
    assert loss == loss_sums(params, CONFIG, elsewhere, PLAIN, 3)[1]["loss"]
    nothing = batch.replace(loss_weights=jnp.zeros_like(batch.loss_weights))
    assert loss_sums(params, CONFIG, nothing, PLAIN, 3)[0] == 0


def _step(state, batch, recipe, mesh=None, config=CONFIG):
    mesh = mesh or make_mesh((1, 1, 1))
    with jax.set_mesh(mesh):
        step = compiled_train_step(config, recipe, 3, mesh)
        return step(jax.tree.map(jnp.copy, state), None, batch, jax.random.key(7))


def _state(recipe, mesh=None, config=CONFIG):
    return init_state(config, recipe, jax.random.key(0), mesh or make_mesh((1, 1, 1)))


def test_a_step_whose_weights_are_gathered_ahead_is_the_same(monkeypatch):
    """In a loop, as on GPUs and TPUs; on CPUs layers are unrolled."""
    mesh = make_mesh((1, 2, 2))
    recipe = dataclasses.replace(PLAIN, dropout=0.1, attention_dropout=0.1, remat="blocks")
    batch = _batch(accumulation=2, rows=4)
    expected, metrics = _step(_state(recipe, mesh), batch, recipe, mesh)
    taken = []
    scan = prefetched_layers.scan
    monkeypatch.setattr(
        prefetched_layers, "scan", lambda *given: taken.append(given) or scan(*given)
    )
    monkeypatch.setattr(training_step, "is_for_cpu", lambda: False)
    monkeypatch.setattr(training_state, "takes_layers_apart", lambda *_: False)
    compiled_train_step.cache_clear()
    got, own = _step(_state(recipe, mesh), batch, recipe, mesh)
    compiled_train_step.cache_clear()
    assert taken
    for name in ("loss", "gradient_norm", "activation_scale"):
        np.testing.assert_allclose(own[name], metrics[name], rtol=1e-5, err_msg=name)
    near = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)
    jax.tree.map(near, got.params, stack_layers(expected.params))


def test_accumulated_micro_batches_equal_one_batch():
    state = _state(PLAIN)
    many = _batch(accumulation=4)
    one = jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), many)
    (by_four, got), (at_once, expected) = (_step(state, b, PLAIN) for b in (many, one))
    for name in ("loss", "accuracy", "gradient_norm", "group_losses", "group_counts"):
        np.testing.assert_allclose(got[name], expected[name], rtol=2e-5, err_msg=name)
    assert int(by_four.samples) == int(at_once.samples) == 8
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        by_four.opt_state,
        at_once.opt_state,
    )


def test_the_embeddings_gradient_shrinks_and_its_forward_pass_does_not():
    whole, shrunk = _state(PLAIN), PLAIN.__class__(**(vars(PLAIN) | {"embedding_gradient": 0.1}))
    (a, first), (b, second) = _step(whole, _batch(), PLAIN), _step(whole, _batch(), shrunk)
    assert first["loss"] == second["loss"]
    ratio = np.asarray(b.opt_state[0].mu.word_embeddings) / np.asarray(
        a.opt_state[0].mu.word_embeddings
    )
    clipped = float(max(first["gradient_norm"], 1.0) / max(second["gradient_norm"], 1.0))
    np.testing.assert_allclose(np.nanmedian(ratio), 0.1 * clipped, rtol=1e-3)
    rising = Recipe(total_samples=1, embedding_gradient=0.1, embedding_gradient_samples=100)
    factors = [float(embedding_factor(rising, jnp.int32(n))) for n in (0, 50, 100, 500)]
    np.testing.assert_allclose(factors, [0.1, 0.55, 1.0, 1.0])


def test_dropout_is_the_same_on_any_mesh_and_in_the_gradient():
    x = jax.random.normal(jax.random.key(1), (8, 6, 512), jnp.bfloat16)
    dropout = Dropout(jax.random.key(0), 0.25)
    alone = np.asarray(drop(x, dropout, 0))
    assert (alone == 0).mean() == pytest.approx(0.25, abs=0.01)
    kept = alone != 0
    np.testing.assert_array_equal(
        alone, np.where(kept, np.float32(x) * np.float32(1 / 0.75), 0).astype(alone.dtype)
    )
    assert (alone != np.asarray(drop(x, dropout, 1))).any()
    mesh = make_mesh((2, 2, 2))
    run = lambda x: drop(x, dropout, 0)
    assert [saved.size for saved in jax.tree.leaves(jax.vjp(run, x)[1])] == [1]  # the seed
    with jax.set_mesh(mesh):
        divided = jax.device_put(x, activation_sharding(mesh, ("batch", "seq", "mlp")))
        np.testing.assert_array_equal(jax.jit(run)(divided), alone)
        gradient = jax.grad(lambda x: jnp.sum(run(x).astype(jnp.float32)))(divided)
    np.testing.assert_array_equal(np.asarray(gradient) != 0, kept)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["dropout", "attention_dropout"])
def test_dropout_keeps_the_mean_and_differs_from_step_to_step(which):
    x = jnp.ones((200, 500))
    dropped = drop(x, Dropout(jax.random.key(0), 0.25), 0)
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.01)
    assert float((dropped == 0).mean()) == pytest.approx(0.25, abs=0.01)
    rates = dict.fromkeys(("dropout", "attention_dropout"), 0.0) | {which: 0.3}
    still = {"learning_rate": 1e-30, "initial_learning_rate": 0.0}
    recipe = Recipe(total_samples=1000, **rates, **still)
    state = _state(recipe)
    state, first = _step(state, _batch(), recipe)
    _, second = _step(state, _batch(), recipe)
    assert first["loss"] != second["loss"]  # nothing but the drawn activations changed


@pytest.mark.parametrize("bad", ["infinite", "large"])
def test_a_bad_step_changes_nothing_but_its_count(bad):
    recipe = Recipe(
        total_samples=1000, dropout=0.0, attention_dropout=0.0, median_window=8, skip_factor=4.0
    )
    state = _state(recipe)
    for i in range(8):
        state, metrics = _step(state, _batch(seed=i), recipe)
        assert not metrics["is_skipped"]
    before = jax.tree.map(np.asarray, state)
    spoilt = state.params.replace(
        word_embeddings=state.params.word_embeddings * (np.inf if bad == "infinite" else 40.0)
    )
    after, metrics = _step(state.replace(params=spoilt), _batch(), recipe)
    assert metrics["is_skipped"]
    assert metrics["is_spike"]
    assert metrics["bad_steps"] == 1
    assert int(after.monitor.skipped) == 1
    same = after.replace(params=before.params, monitor=before.monitor)
    jax.tree.map(np.testing.assert_array_equal, before, same)
    jax.tree.map(np.testing.assert_array_equal, after.params, spoilt)
    np.testing.assert_array_equal(after.monitor.gradient_norms, before.monitor.gradient_norms)
    _, metrics = _step(after.replace(params=before.params), _batch(), recipe)
    assert metrics["bad_steps"] == 0


def test_loss_scale_halves_on_overflow_and_doubles_after_good_steps():
    recipe = Recipe(total_samples=1, loss_scaling=True, loss_scale_window=2)
    monitor = init_monitor(recipe)
    scales, bad = [float(monitor.loss_scale)], []
    for norm in (jnp.inf, jnp.nan, 1.0, 1.0, 1.0, 1.0):
        _, _, monitor = judge(monitor, recipe, jnp.float32(2.0), jnp.float32(norm))
        scales.append(float(monitor.loss_scale))
        bad.append(int(monitor.bad_steps))
    assert scales == [2.0**n for n in (15, 14, 13, 13, 14, 14, 15)]
    assert bad == [0] * 6  # overflows that a smaller scale mends are no bad steps
    stuck = monitor.replace(loss_scale=jnp.float32(1.0))
    assert int(judge(stuck, recipe, jnp.float32(2.0), jnp.float32(jnp.inf))[2].bad_steps) == 1


@pytest.mark.slow
def test_float16_with_loss_scaling_follows_float32():
    recipe = Recipe(
        total_samples=100, dropout=0.0, attention_dropout=0.0, learning_rate=1e-2, loss_scaling=True
    )
    narrow = CONFIG.replace(compute_dtype="float16")
    losses = {}
    for name, config in (("float32", CONFIG), ("float16", narrow)):
        state, losses[name] = _state(recipe, config=config), []
        for i in range(10):
            state, metrics = _step(state, _batch(seed=i % 2), recipe, config=config)
            assert not metrics["is_skipped"]
            losses[name].append(float(metrics["loss"]))
    np.testing.assert_allclose(losses["float16"], losses["float32"], rtol=2e-3)
    assert losses["float32"][-1] < losses["float32"][0] - 0.5


@pytest.mark.parametrize("shape", [(2, 2, 2), pytest.param((1, 4, 2), marks=pytest.mark.slow)])
def test_a_step_is_the_same_on_every_mesh(shape):
    batch = _batch(accumulation=2, rows=4)
    _, expected = _step(_state(PLAIN), batch, PLAIN)
    mesh = make_mesh(shape)
    state = _state(PLAIN, mesh)
    after, got = _step(state, batch, PLAIN, mesh)
    for name in ("loss", "gradient_norm", "update_norm", "activation_scale", "group_losses"):
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-4, err_msg=name)
    assert jax.tree.map(lambda x: x.sharding, after) == jax.tree.map(lambda x: x.sharding, state)
    kernel = after.params.layers[1].dense_4h_to_h.kernel
    assert after.opt_state[0].mu.layers[1].dense_4h_to_h.kernel.sharding == kernel.sharding
    shard = kernel.addressable_shards[0].data
    assert shard.size * shape[1] * shape[2] == kernel.size


@pytest.mark.parametrize("is_on_cpu", [True, False])
def test_checkpoints_hold_layers_stacked_and_steps_hold_them_apart(is_on_cpu, monkeypatch):
    """Not on CPUs the stacks are in hosts' memory: devices have no room for them besides."""
    mesh = make_mesh((1, 2, 2))
    state = _state(PLAIN, mesh)
    monkeypatch.setattr(training_state, "is_cpu", lambda mesh: is_on_cpu)
    assert isinstance(state.opt_state[0].nu.layers, tuple)
    saved, described = saved_form(state), abstract_saved_state(CONFIG, PLAIN, mesh)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)
    assert shapes(saved) == shapes(described)
    is_there = lambda x, of: x.sharding.is_equivalent_to(of.sharding, x.ndim)
    assert jax.tree.all(jax.tree.map(is_there, saved, described))
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(saved.opt_state[0].nu.layers)}
    assert kinds == ({"device"} if is_on_cpu else {HOST_MEMORY})
    kernels = [layer.dense.kernel for layer in state.params.layers]
    np.testing.assert_array_equal(saved.params.layers.dense.kernel, np.stack(kernels))
    back = step_form(saved, abstract_state(CONFIG, PLAIN, mesh))
    jax.tree.map(np.testing.assert_array_equal, back, state)
    assert jax.tree.map(lambda x: x.sharding, back) == jax.tree.map(lambda x: x.sharding, state)
