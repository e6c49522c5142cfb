"""Layer normalisation and GeGLU: every backend equals the formula in float64, gradients too."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.backends import NO_CPU_KERNEL, pairs, why_not_here
from kernels.formula import normal

from glm_jax.kernels.dispatch import BackendError
from glm_jax.kernels.geglu import api as geglu_api
from glm_jax.kernels.geglu.arguments import Arguments as Gated
from glm_jax.kernels.geglu.cpu import CPURows as CPUGeglu
from glm_jax.kernels.geglu.reference import Reference as PlainGeglu
from glm_jax.kernels.layer_norm import api as layer_norm_api
from glm_jax.kernels.layer_norm.arguments import Arguments as Rows
from glm_jax.kernels.layer_norm.cpu import CPURows as CPULayerNorm
from glm_jax.kernels.layer_norm.reference import Reference as PlainLayerNorm

WIDTHS = (512, 256, 0)  # bits of vectors; what the machine lacks falls back to the next
EPSILON = 1e-5
LAYER_NORMS = {
    "reference": PlainLayerNorm(),
    **{f"cpu {bits}": CPULayerNorm(bits) for bits in WIDTHS},
}
GEGLUS = {"reference": PlainGeglu(), **{f"cpu {bits}": CPUGeglu(bits) for bits in WIDTHS}}


@functools.cache
def _rows(rows, width):
    x, scale, bias = normal(0, (2, rows, width), (width,), (width,))
    # A mean that is large beside the deviation, and a row without any.
    return Rows((3 * x + 100).at[0, 0].set(7.0), scale, bias, EPSILON)


@functools.cache
def _gated(rows, width):
    (hidden,) = normal(1, (rows, 2, width))
    # Far into both tails of the normal distribution.
    return Gated((4 * hidden).at[0, 1, :4].set(jnp.array([30.0, -30.0, 0.0, -6.0])))


ROWS = {f"{n} {width}": functools.partial(_rows, n, width) for n, width in ((131, 144), (40, 512))}
GATED = {
    f"{n} {width}": functools.partial(_gated, n, width) for n, width in ((131, 144), (21, 800))
}


def _layer_norm64(x, scale, bias):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + EPSILON) * scale + bias


def _layer_norm_gradients(x, scale, d_out):
    centred = x - x.mean(axis=-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + EPSILON)
    normed, scaled = centred / deviation, d_out * scale
    means = scaled.mean(axis=-1, keepdims=True), (scaled * normed).mean(axis=-1, keepdims=True)
    return (
        (scaled - means[0] - normed * means[1]) / deviation,
        (d_out * normed).sum(axis=(0, 1)),
        d_out.sum(axis=(0, 1)),
    )


@functools.partial(jax.jit, static_argnums=0)
def _run(backend, arguments, d_out):
    """The result, and the gradients of all arrays."""
    out, pull = jax.vjp(backend, arguments)
    return out, jax.tree.leaves(pull(d_out))


@pairs(LAYER_NORMS, ROWS)
def test_layer_norm_and_its_gradients_equal_float64(backend, case):
    a = case()
    (d_out,) = normal(2, a.x.shape)
    out, gradients = _run(backend, a, d_out)
    x, scale, bias, d = (np.asarray(v, np.float64) for v in (a.x, a.scale, a.bias, d_out))
    np.testing.assert_allclose(out, _layer_norm64(x, scale, bias), atol=3e-5)
    expected = _layer_norm_gradients(x, scale, d)
    # The row without deviation divides by sqrt(epsilon).
    np.testing.assert_allclose(gradients[0], expected[0], atol=2e-4)
    for found, right in zip(gradients[1:], expected[1:], strict=True):
        np.testing.assert_allclose(found, right, atol=2e-4)


_phi = np.vectorize(lambda g: 0.5 * math.erfc(-g / math.sqrt(2)))


@pairs(GEGLUS, GATED)
def test_geglu_and_its_gradient_equal_float64(backend, case):
    a = case()
    (d_out,) = normal(3, (a.hidden.shape[0], a.hidden.shape[2]))
    out, (gradient,) = _run(backend, a, d_out)
    hidden, d = np.asarray(a.hidden, np.float64), np.asarray(d_out, np.float64)
    u, g = hidden[:, 0], hidden[:, 1]
    cumulative, density = _phi(g), np.exp(-0.5 * g**2) / math.sqrt(2 * math.pi)
    # The distribution function has an absolute error, of a few roundings at 1.
    assert (np.abs(out - u * g * cumulative) <= 4e-7 * np.abs(u * g)).all()
    expected = np.stack([d * g * cumulative, d * u * (cumulative + g * density)], axis=1)
    bounds = 6e-7 * np.stack([np.abs(d * g), np.abs(d * u)], axis=1)
    assert (np.abs(gradient - expected) <= bounds).all()


@pytest.mark.skipif(why_not_here(CPUGeglu()) is not None, reason=NO_CPU_KERNEL)
def test_a_number_that_is_not_finite_stays_in_its_own_row():
    a, hidden = _rows(131, 144), _gated(131, 144).hidden
    normed = CPULayerNorm()(a.replace(x=a.x.at[1, 3, 5].set(jnp.nan)))
    is_finite = np.isfinite(normed).all(axis=-1)
    assert not is_finite[1, 3]
    assert is_finite.sum() == is_finite.size - 1
    gated = CPUGeglu()(Gated(hidden.at[3, 1, 5].set(jnp.nan).at[3, 1, 6].set(jnp.inf)))
    assert np.isnan(gated[3, 5])
    assert np.isinf(gated[3, 6])
    assert np.isfinite(np.delete(gated, 3, axis=0)).all()
    assert np.isfinite(gated[3, 7:]).all()


@pytest.mark.skipif(why_not_here(CPUGeglu()) is not None, reason=NO_CPU_KERNEL)
@pytest.mark.parametrize(
    ("rows", "dtype", "needs"),
    [(300, "float32", None), (300, "bfloat16", "it takes float32"), (2, "float32", "or more")],
)
def test_the_cpu_kernels_are_chosen_where_they_take_the_arguments(rows, dtype, needs):
    x, scale, bias = normal(4, (rows, 128), (128,), (128,), dtype=dtype)
    norm = lambda name: layer_norm_api.layer_norm(x, scale, bias, EPSILON, name)
    gate = lambda name: geglu_api.geglu(jnp.stack([x, x], axis=-2), name)
    for run in (norm, gate):
        is_kernel = "custom_call" in jax.jit(functools.partial(run, None)).lower().as_text()
        assert is_kernel == (needs is None)
        if needs is not None:
            with pytest.raises(BackendError, match=needs):
                run("cpu")
