"""Moments in few bits, by rows and columns or on the host, and parameters in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glm_jax.config import GLMConfig
from glm_jax.model.adapters import AdapterConfig
from glm_jax.model.params import LinearParams
from glm_jax.model.streamed_layers import HOST_MEMORY
from glm_jax.sharding import make_mesh
from glm_jax.training.optimizer import apply_updates
from glm_jax.training.quantized_moments import dequantize, quantize, scale_by_quantized_adam
from glm_jax.training.recipe import MOMENTS, Recipe
from glm_jax.training.state import init_state, saved_form
from glm_jax.training.trained_params import decay_mask
from glm_jax.training.update import Step, init_moments, update

CONFIG = GLMConfig(3, 32, 64, 4, 96, 32)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8])
@pytest.mark.parametrize("shape", [(3, 256), (5, 40), (7,)])
def test_eight_bits_keep_a_percent_of_what_is_large_and_the_sign_of_what_is_small(dtype, shape):
    x = np.random.default_rng(0).lognormal(0, 3, shape).astype(np.float32)
    x[..., 0] = 0
    x = x if dtype == jnp.uint8 else x * np.resize([1, -1], shape)
    back = np.asarray(dequantize(quantize(jnp.asarray(x), dtype)))
    largest = np.max(np.abs(x.reshape(*shape[:-1], -1, min(128, shape[-1]))), axis=-1)
    largest = np.repeat(largest, min(128, shape[-1]), axis=-1).reshape(shape)
    bits = jnp.iinfo(dtype).max
    # A step of the square's root: as wide as the root is high.
    step = largest * (np.sqrt(np.abs(x) / largest) / bits + 1 / bits**2)
    assert np.all(np.abs(back - x) <= 1.02 * step)
    assert back.ravel()[0] == 0
    if dtype == jnp.uint8:
        assert np.all((back > 0) == (x > 0))


def _distance(transformation, steps=300):
    """How far from the least of a badly scaled square a run ends."""
    target = jax.random.normal(jax.random.key(0), (4, 256))
    widths = 10.0 ** jnp.linspace(-2, 2, 256)
    params = jnp.zeros((4, 256))
    state = transformation.init(params)
    losses = jax.grad(lambda p, noise: jnp.sum(widths * (p - target + noise) ** 2))
    step = jax.jit(lambda p, s, n: transformation.update(losses(p, n), s, p))
    for i in range(steps):
        noise = 0.1 * jax.random.normal(jax.random.key(i), params.shape)
        updates, state = step(params, state, noise)
        params = params - 0.03 * (1 - i / steps) * updates
    return float(jnp.sqrt(jnp.mean((params - target) ** 2)))


@pytest.mark.gpu
def test_eight_bits_descend_as_far_as_floats():
    narrowed = _distance(scale_by_quantized_adam(0.9, 0.95, 1e-8))
    exact = _distance(optax.scale_by_adam(0.9, 0.95, 1e-8))
    assert narrowed < 1.1 * exact + 1e-3, (narrowed, exact)


def test_updates_smaller_than_a_bit_happen_as_often_as_they_are_large():
    params = jnp.ones((200, 200), jnp.bfloat16)
    update_by = jnp.full(params.shape, 2.0**-10)  # an eighth of the last bit
    moved = apply_updates([params], [update_by], jax.random.key(0))[0]
    assert set(np.unique(np.asarray(moved, np.float32))) == {1.0, 1 + 2.0**-7}
    assert float(jnp.mean(moved.astype(jnp.float32))) == pytest.approx(1 + 2.0**-10, abs=1e-4)
    back = apply_updates([moved], [-update_by], jax.random.key(1))[0]
    assert float(jnp.mean(back.astype(jnp.float32))) == pytest.approx(1, abs=1e-4)
    overflown = apply_updates([params], [jnp.full(params.shape, jnp.inf)], jax.random.key(0))
    assert np.all(np.isinf(np.asarray(overflown[0], np.float32)))


def _steps(recipe, count=3, mesh=None):
    mesh = mesh or make_mesh((1, 1, 1))
    state = saved_form(init_state(CONFIG, recipe, jax.random.key(0), mesh))
    params, moments, norms = state.params, state.opt_state, []

    def one(params, moments, number):
        key = jax.random.fold_in(jax.random.key(1), number)
        leaves, structure = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        drawn = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
        shared = Step(jnp.float32(0.5), jnp.float32(1e-2), number != 1, key)
        gradients = jax.tree.unflatten(structure, drawn)
        decays = decay_mask(CONFIG, recipe, is_stacked=True)
        return update(params, gradients, moments, recipe, decays, shared)

    with jax.set_mesh(mesh):
        for number in range(count):
            params, moments, norm = jax.jit(one)(params, moments, jnp.int32(number))
            norms.append(float(norm))
    return params, moments, norms


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "moments"),
    [
        pytest.param(shape, moments, marks=() if shape[1] == 2 else pytest.mark.slow)
        for shape in ((1, 1, 1), (1, 2, 4))
        for moments in MOMENTS
    ],
)
def test_moments_on_the_host_are_those_of_each_block_by_itself(moments, shape):
    """And the step that is not good, the second, changes nothing."""
    recipe = Recipe(total_samples=100, moments=moments, offload_moments=True, weight_decay=0.1)
    got, waiting, norms = _steps(recipe, mesh=make_mesh(shape))
    assert any(x.sharding.memory_kind == HOST_MEMORY for x in jax.tree.leaves(waiting.layers))
    plain, _, plain_norms = _steps(
        Recipe(total_samples=100, moments=moments, weight_decay=0.1), mesh=make_mesh(shape)
    )
    # A whole model's Adam is that of its blocks.
    assert norms == pytest.approx(plain_norms, rel=1e-5)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, got, plain)


def test_factored_moments_are_optaxs():
    recipe = Recipe(
        total_samples=100, moments="factored", weight_decay=0.0, adapter=AdapterConfig()
    )
    draw = lambda seed: jax.random.normal(jax.random.key(seed), (256, 384))
    params, gradient = LinearParams(draw(0), None), LinearParams(draw(1), None)
    peer = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    expected, _ = peer.update(gradient, peer.init(params), params)
    shared = Step(jnp.float32(1), jnp.float32(1e-2), jnp.array(True), jax.random.key(0))
    decays = LinearParams(True, None)
    moments = init_moments(params, recipe, decays)
    moved, after, _ = update(params, gradient, moments, recipe, decays, shared)
    got = (params.kernel - moved.kernel) / 1e-2
    np.testing.assert_allclose(got, expected.kernel, rtol=1e-2, atol=1e-3)
    assert sum(x.size for x in jax.tree.leaves(after)) < 2 * (256 + 384)
