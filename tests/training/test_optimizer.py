"""The optimiser: its formula and schedule, what decays, and where its state is sharded."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glm_jax.config import GLMConfig
from glm_jax.model import params as glm_params
from glm_jax.model.adapters import AdapterConfig
from glm_jax.model.streamed_layers import HOST_MEMORY, is_streamed
from glm_jax.sharding import make_mesh
from glm_jax.training import trained_params
from glm_jax.training.optimizer import clipping, learning_rate, make_optimizer
from glm_jax.training.recipe import MOMENTS, Recipe
from glm_jax.training.state import abstract_saved_state, state_shardings
from glm_jax.training.update import Step, init_moments, update

CONFIG = GLMConfig(2, 256, 384, 4, 96, 32)


@pytest.mark.parametrize("adapter", [None, AdapterConfig(rank=4)])
@pytest.mark.parametrize("is_stacked", [True, False])
def test_every_parameter_says_whether_it_decays(adapter, is_stacked):
    recipe = Recipe(total_samples=1, adapter=adapter)
    decays = trained_params.decay_mask(CONFIG, recipe, is_stacked or adapter is not None)
    decayed, others = set(), set()
    for path, is_decayed in jax.tree_util.tree_leaves_with_path(decays):
        name = jax.tree_util.keystr(path[-1:], simple=True)
        (decayed if is_decayed else others).add(name)
    assert decayed == ({"kernel", "word_embeddings"} if adapter is None else {"down", "up"})
    assert others == ({"scale", "bias"} if adapter is None else set())


def test_a_new_parameter_must_say_whether_it_decays():
    with pytest.raises(TypeError, match="decays"):
        glm_params.ParamSpec((4,), "float32", (None,), glm_params.constant(0.0))
    spec = glm_params.ParamSpec((4,), "float32", (None,), glm_params.constant(1.0), decays=True)
    # A parameter of any name decays if its spec says so, and only then.
    specs = {"any": {"name": spec}, "kernel": dataclasses.replace(spec, decays=False)}
    decays = {"any": {"name": True}, "kernel": False}
    params = glm_params.init_of(specs, jax.random.key(0), None)
    transformation = make_optimizer(Recipe(total_samples=1, weight_decay=0.1), decays)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = transformation.update(zeros, transformation.init(params), params)
    np.testing.assert_allclose(updates["any"]["name"], 0.1, rtol=1e-6)
    np.testing.assert_array_equal(updates["kernel"], 0)


@pytest.mark.parametrize("moments", ["float32", "int8"])
def test_moments_are_sharded_as_their_parameters(moments):
    mesh = make_mesh((1, 2, 4))
    state = abstract_saved_state(CONFIG, Recipe(total_samples=1, moments=moments), mesh)
    specs = {
        leaf.shape: leaf.sharding.spec
        for leaf in jax.tree.leaves(state.params)
        if len(leaf.shape) > 2 or leaf.shape == (96, 256)  # each of them of one parameter alone
    }
    assert specs[96, 256] == jax.sharding.PartitionSpec("tensor", "fsdp")
    # Moments have their parameter's shape; scales and counts do not.
    like = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape in specs]
    assert len(like) == 14
    for leaf in like:
        assert leaf.sharding.spec == specs[leaf.shape], leaf
    counts = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.dtype == jnp.int32]
    assert counts
    assert all(leaf.sharding.is_fully_replicated for leaf in counts)


def test_an_optimiser_with_other_names_is_sharded_alike(monkeypatch):
    """Shardings come from optax, not from what the fields of a state are called."""
    other = lambda recipe, decays: optax.chain(optax.trace(0.9), optax.add_noise(0.1, 0.5, 0))
    for module in ("update", "state"):
        monkeypatch.setattr(f"glm_jax.training.{module}.make_optimizer", other)
    state = abstract_saved_state(CONFIG, Recipe(total_samples=1), make_mesh((1, 2, 4)))
    same = lambda moment, param: moment.sharding == param.sharding
    assert jax.tree.all(jax.tree.map(same, state.opt_state[0].trace, state.params))
    assert state.opt_state[1].count.sharding.is_fully_replicated


@pytest.mark.parametrize("moments", MOMENTS)
def test_offloaded_moments_are_the_layers_large_ones(moments):
    recipe = Recipe(total_samples=1, moments=moments, offload_moments=True)
    mesh = make_mesh((1, 2, 4))
    state = abstract_saved_state(CONFIG, recipe, mesh)
    of_state = jax.tree.map(lambda leaf: leaf.sharding, state)
    for shardings in (of_state, state_shardings(CONFIG, recipe, mesh)):
        kinds = jax.tree.map(lambda s: s.memory_kind == HOST_MEMORY, shardings)
        assert kinds.opt_state.layers == jax.tree.map(is_streamed, state.opt_state.layers)
        assert not any(jax.tree.leaves((kinds.params, kinds.opt_state.rest, kinds.monitor)))


def test_adamw_step_equals_the_formula():
    recipe = Recipe(total_samples=1000, gradient_clip=0.5)
    params = glm_params.LinearParams(jnp.array([2.0]), jnp.array([2.0]))
    gradient = glm_params.LinearParams(jnp.array([3.0]), jnp.array([4.0]))
    factor = clipping(optax.global_norm(gradient), recipe)
    shared = Step(factor, jnp.float32(0.01), jnp.array(True), jax.random.key(0))
    decays = glm_params.LinearParams(True, False)
    moments = init_moments(params, recipe, decays)
    moved, after, norm = update(params, gradient, moments, recipe, decays, shared)
    # Clipped by 10; the first Adam update is the gradient's sign.
    np.testing.assert_allclose(moved.kernel, 2 - 0.01 * (1 + 0.1 * 2.0), rtol=1e-4)
    np.testing.assert_allclose(moved.bias, 2 - 0.01, rtol=1e-4)
    assert float(norm) == pytest.approx(0.01 * np.hypot(1.2, 1), rel=1e-4)
    assert float(optax.global_norm(after[0].mu)) == pytest.approx(0.1 * 0.5, rel=1e-4)
    assert float(clipping(jnp.float32(0.3), recipe)) == 1


def test_learning_rate_is_the_papers():
    rate = functools.partial(learning_rate, Recipe(total_samples=10_000))
    assert float(rate(0)) == pytest.approx(1e-7)
    assert float(rate(50)) == pytest.approx(8e-5)
    assert float(rate(25)) == pytest.approx((1e-7 + 8e-5) / 2)
    assert float(rate(10_000)) == pytest.approx(8e-6)
    assert float(rate(5025)) == pytest.approx((8e-5 + 8e-6) / 2)
