"""Linears in float8: their numbers, also those not finite, and a model that learns."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.config import ConfigError, GLMConfig
from glm_jax.model.adapters import AdapterConfig
from glm_jax.model.float8 import float8_product
from glm_jax.sharding import make_mesh
from glm_jax.training.recipe import Recipe
from glm_jax.training.state import TrainBatch, init_state
from glm_jax.training.step import check_matmul_precision, compiled_train_step

CONFIG = GLMConfig(2, 32, 64, 4, 96, 32, compute_dtype="bfloat16")


def _rounded(x, dtype):
    """x in float8 with the smallest power of two for its scale that fits."""
    scale = 2.0 ** np.ceil(np.log2(np.abs(x).max() / float(jnp.finfo(dtype).max)))
    return np.asarray(jnp.asarray(x / scale).astype(dtype), np.float64) * scale


def test_products_and_gradients_are_those_of_the_rounded_numbers():
    draws = jax.random.split(jax.random.key(0), 3)
    x = 300 * jax.random.normal(draws[0], (2, 3, 16))
    kernel = 1e-3 * jax.random.normal(draws[1], (16, 2, 4))
    gradient = 1e-6 * jax.random.normal(draws[2], (2, 3, 2, 4))
    out, pull_back = jax.vjp(jax.jit(float8_product), x, kernel)
    of_x, of_kernel = pull_back(gradient)
    a, b = (_rounded(np.asarray(v), jnp.float8_e4m3fn) for v in (x, kernel))
    g = _rounded(np.asarray(gradient), jnp.float8_e5m2)
    np.testing.assert_allclose(out, np.einsum("bsi,iot->bsot", a, b), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(of_x, np.einsum("bsot,iot->bsi", g, b), rtol=1e-5, atol=1e-13)
    np.testing.assert_allclose(of_kernel, np.einsum("bsi,bsot->iot", a, g), rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(out, np.einsum("bsi,iot->bsot", x, kernel), atol=0.1 * np.std(out))


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_number_that_is_not_finite_is_not_hidden(bad):
    """So that the step is skipped."""
    x, kernel = jnp.ones((1, 2, 4)), jnp.ones((4, 3))
    assert not np.isfinite(float8_product(x.at[0, 0, 0].set(bad), kernel)).any()
    gradient = jax.vjp(float8_product, x, kernel)[1](jnp.ones((1, 2, 3)).at[0, 0, 0].set(bad))
    assert not any(np.isfinite(part).any() for part in gradient)
    assert not float8_product(jnp.zeros_like(x), kernel).any()


def _device(platform, kind, capability=""):
    return types.SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability)


@pytest.mark.parametrize(
    ("device", "dtype", "message"),
    [
        (_device("gpu", "A100", "8.0"), "bfloat16", "A100 has compute capability 8.0"),
        (_device("tpu", "TPU v5p"), "bfloat16", "for NVIDIA GPUs, not TPU v5p"),
        (_device("gpu", "H100", "9.0"), "float16", "no range"),
        (_device("gpu", "H100", "9.0"), "bfloat16", None),
        (_device("gpu", "L40", "8.9"), "bfloat16", None),
        (_device("cpu", "cpu"), "float32", None),
    ],
)
def test_devices_and_dtypes_without_it_are_refused(device, dtype, message):
    recipe = Recipe(total_samples=1, matmul_precision="float8")
    config = CONFIG.replace(compute_dtype=dtype)
    if message is None:
        check_matmul_precision(config, recipe, device)
    else:
        with pytest.raises(
            ConfigError, match=rf"optimizer\.matmul_precision='float8': .*{message}"
        ):
            check_matmul_precision(config, recipe, device)
    check_matmul_precision(config, Recipe(total_samples=1), device)


def test_fields_that_do_not_go_together_are_refused():
    with pytest.raises(ConfigError, match=r"matmul_precision='fp8': one of"):
        Recipe(total_samples=1, matmul_precision="fp8")
    with pytest.raises(ConfigError, match="without adapters"):
        Recipe(total_samples=1, matmul_precision="float8", adapter=AdapterConfig())


def _losses(precision, seed, mesh, steps):
    recipe = Recipe(
        total_samples=400, dropout=0.0, attention_dropout=0.0, learning_rate=1e-2,
        warmup_fraction=0.05, matmul_precision=precision,
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    # A language that can be learnt: each token is followed by one of two.
    followers = np.random.default_rng(0).integers(0, 96, (96, 2))
    losses = []
    with jax.set_mesh(mesh):
        state = init_state(CONFIG, recipe, jax.random.key(seed), mesh)
        step = compiled_train_step(CONFIG, recipe, 1, mesh)
        for _ in range(steps):
            rows = [rng.integers(0, 96, 8)]
            for _ in range(32):
                rows.append(followers[rows[-1], rng.integers(0, 2, 8)])
            text = np.stack(rows, 1)[None].astype(np.int32)
            same = lambda value, text=text: jnp.full(text[..., 1:].shape, value, jnp.int32)
            batch = TrainBatch(
                tokens=jnp.asarray(text[..., :-1]),
                targets=jnp.asarray(text[..., 1:]),
                loss_weights=same(1).astype(jnp.float32),
                position_ids=same(0) + jnp.arange(32),
                context_length=same(1),
                segment_ids=same(1),
                groups=same(0),
            )
            state, metrics = step(state, None, batch, jax.random.key(1))
            losses.append(float(metrics["loss"]))
    return np.array(losses), state


@pytest.mark.slow
def test_a_model_learns_as_in_bfloat16_and_on_a_mesh_the_same():
    """The difference is within that between seeds; the state has no more arrays."""
    alone = make_mesh((1, 1, 1))
    ends = {
        precision: [_losses(precision, seed, alone, 50)[0][-10:].mean() for seed in range(3)]
        for precision in ("default", "float8")
    }
    assert max(ends["float8"]) < 3.5 < np.log(96)
    spread = np.ptp(ends["default"])
    assert abs(np.mean(ends["float8"]) - np.mean(ends["default"])) < spread
    losses, state = _losses("float8", 0, alone, 3)
    on_mesh, _ = _losses("float8", 0, make_mesh((1, 2, 2)), 3)
    np.testing.assert_allclose(losses, on_mesh, rtol=5e-3)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)
    assert shapes(state) == shapes(_losses("default", 0, alone, 1)[1])
    again, _ = _losses("float8", 0, alone, 3)
    np.testing.assert_array_equal(losses, again)
