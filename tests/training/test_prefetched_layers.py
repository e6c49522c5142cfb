"""Weights that are gathered a layer ahead: the results and gradients are those of a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.config import GLMConfig
from glm_jax.model import params as glm_params
from glm_jax.model import prefetched_layers
from glm_jax.model.layers import Dropout
from glm_jax.model.training import training_hidden
from glm_jax.model.visibility import Visibility
from glm_jax.numerics import trained_products
from glm_jax.sharding import make_mesh

LENGTH = 16


def _config(dtype):
    config = GLMConfig(3, 32, 64, 4, 96, LENGTH, compute_dtype=dtype)
    return config.replace(param_dtype="float32")


def _results(config, mesh, remat, dropout):
    """A sum of the final hidden states, each times a number, how large each block's output is, and
    gradients."""
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 96, (4, LENGTH)))
    positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    factors = jnp.asarray(rng.standard_normal((4, LENGTH, 32)), jnp.float32)
    visibility = Visibility.prefix(jnp.array([3, 5, 1, 9]), LENGTH)
    params = glm_params.init(config, jax.random.key(1), mesh)
    params = jax.tree.map(lambda x: x + 0.1, params)  # biases and norms are not zero

    @jax.jit
    def run(params):
        def total(params):
            hidden, scales = training_hidden(
                params, config, tokens, positions, visibility, remat, dropout
            )
            return jnp.sum(hidden * factors), scales

        return jax.value_and_grad(total, has_aux=True)(params)

    with jax.set_mesh(mesh), trained_products(config.compute_dtype, on_cpu=True):
        assert prefetched_layers.suits(params.layers, config)
        return run(params)


@pytest.mark.parametrize(
    ("shape", "dtype", "rate", "tolerance"),
    [
        ((2, 2, 1), "float32", 0.0, 1e-5),
        ((1, 4, 1), "bfloat16", 0.25, 0.02),
    ],
)
def test_results_and_gradients_are_those_of_a_plain_loop(
    shape, dtype, rate, tolerance, monkeypatch
):
    config, mesh = _config(dtype), make_mesh(shape)
    dropout = Dropout(jax.random.key(3), rate, rate) if rate else None
    (expected, scales), plain = _results(config, mesh, "none", dropout)
    taken = []
    scan = prefetched_layers.scan
    monkeypatch.setattr(
        prefetched_layers, "scan", lambda *given: taken.append(given) or scan(*given)
    )
    (found, own_scales), gradients = _results(config, mesh, "blocks", dropout)
    assert taken
    # A sum of 2048 numbers of either sign.
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * 2048**0.5)
    np.testing.assert_allclose(own_scales, scales, rtol=tolerance)
    shardings = jax.tree.map(lambda x: x.sharding, glm_params.abstract(config, mesh))

    def compare(path, own, of_plain, sharding):
        assert own.dtype == jnp.float32
        assert own.sharding.is_equivalent_to(sharding, own.ndim)
        largest = np.abs(of_plain).max()
        assert largest > 0
        np.testing.assert_allclose(
            own, of_plain, atol=tolerance * largest, rtol=0, err_msg=str(path)
        )

    jax.tree.map_with_path(compare, gradients.layers, plain.layers, shardings.layers)
    norms = (gradients.final_layernorm, gradients.word_embeddings)
    jax.tree.map(
        lambda own, of_plain: np.testing.assert_allclose(own, of_plain, atol=10 * tolerance),
        norms,
        (plain.final_layernorm, plain.word_embeddings),
    )


def test_what_it_is_not_for():
    """A mesh that divides no weights, one device, layers apart, and quantised ones."""
    config = _config("float32")
    params = glm_params.init(config, jax.random.key(1))
    quantized = glm_params.quantize_params(params, glm_params.Scheme(8))
    with jax.set_mesh(make_mesh((1, 2, 1))):
        assert prefetched_layers.suits(params.layers, config)
        assert not prefetched_layers.suits(quantized.layers, config)
        assert not prefetched_layers.suits((params.layers,) * 3, config)
    with jax.set_mesh(make_mesh((2, 1, 2))):
        assert not prefetched_layers.suits(params.layers, config)
    assert not prefetched_layers.suits(params.layers, config)
