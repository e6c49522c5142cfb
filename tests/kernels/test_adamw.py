"""AdamW: every backend equals the formula in float64; on CPU it changes a donated state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from kernels.backends import NO_CPU_KERNEL, pairs, why_not_here
from kernels.formula import normal

from glm_jax.kernels.adamw.api import adamw
from glm_jax.kernels.adamw.arguments import Arguments
from glm_jax.kernels.adamw.cpu import CPUInPlace
from glm_jax.kernels.adamw.reference import Reference

BACKENDS = {
    "reference": Reference(),
    **{f"cpu {bits}": CPUInPlace(bits) for bits in (512, 256, 0)},
}
FACTOR, RATE, STEP = 0.5, 1e-2, 3
BETA1, BETA2, EPSILON = 0.9, 0.95, 1e-8


def _arguments(shape, decay, is_good=True):
    param, gradient, first, second = normal(0, shape, shape, shape, shape)
    # From gradients that are hardly there to large ones.
    gradient = gradient * 10.0 ** jnp.linspace(-9, 2, shape[-1])
    corrections = 1 - jnp.array([BETA1, BETA2], jnp.float32) ** STEP
    scalars = jnp.float32(FACTOR), jnp.float32(RATE), corrections, jnp.bool_(is_good)
    constants = BETA1, BETA2, EPSILON, decay
    return Arguments(param, gradient, 0.1 * first, second**2, *scalars, *constants)


CASES = {
    "decays": functools.partial(_arguments, (130, 272), 0.1),
    "three axes": functools.partial(_arguments, (64, 3, 176), 0.0),
}


@pairs(BACKENDS, CASES)
def test_adamw_equals_float64(backend, case):
    a = case()
    p, g, first, second, corrections = (
        np.asarray(x, np.float64) for x in (a.param, a.gradient, a.first, a.second, a.corrections)
    )
    sizes = BETA1 * np.abs(first) + (1 - BETA1) * FACTOR * np.abs(g)
    first = BETA1 * first + (1 - BETA1) * FACTOR * g
    second = BETA2 * second + (1 - BETA2) * (FACTOR * g) ** 2
    direction = first / corrections[0] / (np.sqrt(second / corrections[1]) + EPSILON)
    change = -RATE * (direction + a.decay * p)
    found = jax.jit(backend)(a)
    # Roundings of what is added, a few of each.
    np.testing.assert_allclose(found[0], p + change, atol=1e-6, rtol=2e-7)
    assert (np.abs(found[1] - first) <= 3e-7 * sizes).all()
    np.testing.assert_allclose(found[2], second, rtol=4e-7)
    np.testing.assert_allclose(found[3], (change**2).sum(), rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_a_step_that_is_not_good_changes_no_bit(backend):
    if (why := why_not_here(backend)) is not None:
        pytest.skip(why)
    a = _arguments((130, 272), 0.1, is_good=False)
    a = a.replace(gradient=a.gradient.at[0, :7].set(jnp.nan))
    *after, _ = jax.jit(backend)(a)
    for new, old in zip(after, (a.param, a.first, a.second), strict=True):
        np.testing.assert_array_equal(new, old)


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_adamw_equals_optax(backend):
    if (why := why_not_here(backend)) is not None:
        pytest.skip(why)
    a = _arguments((130, 272), 0.1)
    chain = optax.chain(
        optax.scale_by_adam(BETA1, BETA2, EPSILON), optax.add_decayed_weights(a.decay)
    )
    adam, other = chain.init(a.param)
    state = (adam._replace(count=jnp.int32(STEP - 1), mu=a.first, nu=a.second), other)
    updates, (adam, _) = chain.update(FACTOR * a.gradient, state, a.param)
    param, first, second, _ = jax.jit(backend)(a)
    np.testing.assert_allclose(param, a.param - RATE * updates, atol=1e-6)
    np.testing.assert_allclose(first, adam.mu, atol=2e-6)
    np.testing.assert_allclose(second, adam.nu, rtol=4e-7)


@pytest.mark.skipif(why_not_here(CPUInPlace()) is not None, reason=NO_CPU_KERNEL)
def test_a_donated_state_is_changed_where_it_lies():
    a = _arguments((131, 272), 0.1)

    def step(state, gradient):
        param, first, second = state
        return adamw(a.replace(param=param, first=first, second=second, gradient=gradient))[:3]

    state = a.param, a.first, a.second
    compiled = jax.jit(step, donate_argnums=0).lower(state, a.gradient).compile()
    copies = [
        line for line in compiled.as_text().splitlines() if "131,272" in line and " copy(" in line
    ]
    assert not copies
    assert "custom-call" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < a.param.nbytes
