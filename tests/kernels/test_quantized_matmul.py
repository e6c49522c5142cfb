"""The op: one answer and one gradient, whatever holds the weight and wherever it lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from glm_jax.kernels.quantized_matmul import cpu, reference
from glm_jax.kernels.quantized_matmul.api import quantized_matmul
from glm_jax.kernels.quantized_matmul.arguments import Problem
from glm_jax.kernels.quantized_matmul.triton_blocks import candidates, choose
from glm_jax.model.params import KERNEL_AXES
from glm_jax.quantization import Scheme, dequantize, quantize
from glm_jax.sharding import make_mesh, parameter_spec

SCHEMES = (Scheme(8), Scheme(4, 32), Scheme(4, 64, zero_point=True))


def _weight(scheme, inputs=192, outputs=(2, 24), axes=None):
    kernel = jax.random.normal(jax.random.key(0), (inputs, *outputs))
    return quantize(kernel, scheme, -1 - len(outputs), axes)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("is_tiled", [False, True])
def test_value_and_gradients(scheme, is_tiled):
    weight = _weight(scheme)
    exact = dequantize(weight, jnp.float32)
    x, bias = jax.random.normal(jax.random.key(1), (3, 5, 192)), jnp.arange(48.0).reshape(2, 24)
    held = cpu.tile(weight) if is_tiled else weight

    def loss(x, bias, product):
        out = product(x, bias)
        return jnp.sum(jnp.sin(out)), out

    grad = lambda product: jax.value_and_grad(
        lambda x, bias: loss(x, bias, product), argnums=(0, 1), has_aux=True
    )
    (_, got), gradients = jax.jit(grad(lambda x, b: quantized_matmul(x, held, b)))(x, bias)
    (_, expected), expected_gradients = grad(
        lambda x, b: jnp.tensordot(x, exact, 1, precision="highest") + b
    )(x, bias)
    assert got.shape == (3, 5, 2, 24)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    for a, b in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)


def test_under_scan():
    weights = [_weight(Scheme(4, 64), 64, (64,)) for _ in range(3)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *weights)
    x = jax.random.normal(jax.random.key(1), (5, 64))
    step = lambda x, weight: (jnp.tanh(quantized_matmul(x, weight)), None)
    got, _ = jax.jit(lambda x: jax.lax.scan(step, x, stacked))(x)
    for weight in weights:
        x = jnp.tanh(reference.matmul(x, weight))
    np.testing.assert_allclose(got, x, atol=1e-5)


@pytest.mark.parametrize("scheme", [*SCHEMES, Scheme(4, None)])
@pytest.mark.parametrize("mesh_shape", [(1, 1, 8), (2, 2, 2), (1, 8, 1), (1, 4, 2)])
@pytest.mark.parametrize("name", ["query_key_value", "dense", "dense_4h_to_h"])
def test_divided_among_devices(scheme, mesh_shape, name):
    """Groups that do not divide among the devices are split; 3 groups over 8 devices too."""
    axes = KERNEL_AXES[name]
    outputs = (8, 3, 16) if name == "query_key_value" else (128,)
    weight = _weight(scheme, 192, outputs, axes)
    mesh = make_mesh(mesh_shape)
    spec = parameter_spec(mesh.shape, axes, weight.values.shape)
    place = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
    scales = PartitionSpec(None, *spec[1:])
    zeros = weight.zero_points
    held = weight.replace(
        values=place(weight.values, spec),
        scales=place(weight.scales, scales),
        zero_points=None if zeros is None else place(zeros, scales),
    )
    x = jax.random.normal(jax.random.key(1), (4, 3, 192))
    bias = jax.random.normal(jax.random.key(2), outputs)
    expected, pullback = jax.vjp(lambda x: quantized_matmul(x, weight, bias), x)
    with jax.set_mesh(mesh):
        got, sharded_pullback = jax.vjp(jax.jit(lambda x: quantized_matmul(x, held, bias)), x)
        text = jax.jit(quantized_matmul).lower(x, held, bias).compile().as_text()
        [of_x] = sharded_pullback(expected)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    np.testing.assert_allclose(of_x, pullback(expected)[0], rtol=1e-5, atol=1e-3)
    gathered = [line for line in text.splitlines() if "all-gather(" in line and "s8[" in line]
    assert not gathered


def test_shapes_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match=r"cannot multiply a weight \(192, 2, 24\)"):
        quantized_matmul(jnp.ones((3, 191)), _weight(Scheme(8)))


def test_blocks_fit_every_problem_that_they_are_chosen_for():
    for problem in (Problem(1, 12288, 36864, 4, 12288), Problem(40, 768, 96, 8, 32)):
        blocks = choose(problem)
        assert blocks is not None
        for each in (blocks, *candidates(problem)):
            assert problem.outputs % each.outputs == 0
            assert problem.group_size % each.inputs == 0
            assert problem.inputs % (each.inputs * each.splits) == 0
    assert choose(Problem(1, 48, 40, 4, 24)) is None
    # Few rows and few outputs: the inputs are split, so that all multiprocessors read.
    assert choose(Problem(1, 32768 // 8, 12288, 4, 32768 // 8)).splits > 1
