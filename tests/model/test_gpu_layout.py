"""A quantised model laid out for GPUs of compute capability 9.0, on CPU devices."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.config import GLMConfig
from glm_jax.kernels.quantized_matmul import mosaic_check
from glm_jax.kernels.quantized_matmul.api import MosaicArray
from glm_jax.kernels.quantized_matmul.mosaic_check import Kind, first_fault
from glm_jax.model import device_layout, gpu_layout
from glm_jax.model import params as glm_params
from glm_jax.model.adapters import AdapterConfig, attach
from glm_jax.model.adapters import specs as adapter_specs
from glm_jax.model.glm import forward
from glm_jax.model.layer_stacks import unstack_layers
from glm_jax.quantization import QuantizedArray, Scheme
from glm_jax.sharding import make_mesh, on_mesh

KIND = Kind(bits=4, inputs=128, group_size=64, dtype="float16", zeros=True)
CONFIG = GLMConfig(1, 128, 256, 2, 64, 16, param_dtype="float16", compute_dtype="float16")
IS_RIGHT = lambda kinds: None


def _params(mesh=None, config=CONFIG):
    scheme = Scheme(4, 64, True)
    with on_mesh(mesh):
        params = glm_params.init(config, jax.random.key(0), mesh)
        return unstack_layers(glm_params.quantize_params(params, scheme))


def _kernels(params):
    [layer] = params.layers
    return [getattr(layer, name).kernel for name in glm_params.LINEAR_NAMES]


def _logits(params):
    tokens = jnp.arange(4)[None]
    return np.asarray(forward(params, CONFIG, tokens, tokens, jnp.ones((1, 4, 4), bool)))


def _products(params, mesh):
    """Of each linear, with the same activations."""
    [layer] = params.layers

    def run(layer):
        linears = (getattr(layer, name) for name in glm_params.LINEAR_NAMES)
        ones = lambda linear: jnp.ones((2, linear.weight.shape[0]), "float16")
        return [linear.weight.matmul(ones(linear), linear.bias) for linear in linears]

    with on_mesh(mesh):
        return np.concatenate([np.ravel(x) for x in jax.jit(run)(layer)])


def test_a_laid_out_model_gives_the_same_logits_and_takes_adapters():
    params = _params()
    adapters = glm_params.init_of(adapter_specs(CONFIG, AdapterConfig(2)), jax.random.key(1), None)
    adapted = attach(params, adapters, 2.0)
    expected = _logits(adapted)
    laid_out = gpu_layout.lay_out(adapted, why_not=IS_RIGHT)
    assert all(isinstance(kernel.frozen, MosaicArray) for kernel in _kernels(laid_out))
    np.testing.assert_allclose(_logits(laid_out), expected, atol=2e-2)
    again = gpu_layout.lay_out(laid_out, why_not=None)  # nothing is left to check
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, laid_out, again))


def test_prepare_lays_a_model_on_a_mesh_out_where_its_devices_are_for_it(monkeypatch):
    mesh = make_mesh((1, 1, 2))
    params = _params(mesh)
    expected = _products(params, mesh)
    asked = []
    monkeypatch.setattr(mosaic_check, "is_for", lambda device: True)
    monkeypatch.setattr(gpu_layout.mosaic_check, "why_not", asked.append)
    prepared = device_layout.prepare(params)
    assert all(isinstance(kernel, MosaicArray) for kernel in _kernels(prepared))
    assert {kind.bits for kind in asked[0]} == {4}
    np.testing.assert_allclose(_products(prepared, mesh), expected, atol=2e-2)
    donated = device_layout.prepare(params, donate=True)
    assert all(kernel.values.is_deleted() for kernel in _kernels(params))
    jax.tree.map(np.testing.assert_array_equal, prepared, donated)


def test_a_weight_without_whole_tiles_stays_as_stored():
    """Heads of 32 on two devices have 96 outputs, the other linears have whole tiles."""
    config = GLMConfig(1, 64, 128, 2, 64, 16, param_dtype="float16", compute_dtype="float16")
    mesh = make_mesh((1, 1, 2))
    with pytest.warns(UserWarning, match="stay as they are stored.*no multiples of 64"):
        laid_out = gpu_layout.lay_out(_params(mesh, config), why_not=IS_RIGHT)
    kinds = [type(kernel) for kernel in _kernels(laid_out)]
    assert kinds[0] is QuantizedArray
    assert MosaicArray in kinds


def test_a_kernel_that_fails_its_check_is_not_used(monkeypatch):
    params = _params()
    with pytest.warns(UserWarning, match="slower: off by two") as caught:
        assert gpu_layout.lay_out(params, why_not=lambda kinds: "off by two") is params
    assert len(caught) == 1
    monkeypatch.setenv("GLM_JAX_QUANTIZED_LAYOUT", "stored")
    with warnings.catch_warnings(action="error"):
        assert gpu_layout.lay_out(params, why_not=None) is params
    monkeypatch.setenv("GLM_JAX_QUANTIZED_LAYOUT", "fast")
    with pytest.raises(gpu_layout.LayoutError, match="=fast: expected stored"):
        gpu_layout.lay_out(params)


def test_there_must_be_memory_for_both_forms_of_weights_that_stay(monkeypatch):
    params = _params()
    statistics = {"bytes_limit": 1000, "bytes_in_use": 900}
    monkeypatch.setattr(gpu_layout, "_statistics", lambda device: statistics)
    with pytest.warns(UserWarning, match="donate=True"):
        assert gpu_layout.lay_out(params, why_not=IS_RIGHT) is params
    assert gpu_layout.lay_out(params, donate=True, why_not=IS_RIGHT) is not params


def test_the_check_finds_wrong_products():
    kernel = pytest.importorskip("glm_jax.kernels.quantized_matmul.mosaic_converted")
    products = kernel.matmul, kernel.transposed_matmul
    assert first_fault(KIND, *products, (1, 3), 64) is None
    wrong = lambda x, weight: kernel.matmul(x, weight) * 1.01
    assert "4 bits, 1 rows: a relative error of 0.0" in first_fault(
        KIND, wrong, products[1], (1, 3), 64
    )
    missing = lambda y, weight: kernel.transposed_matmul(y, weight).at[-1].set(jnp.nan)
    assert "transpose, 4 bits, 3 rows: a relative error of nan" in first_fault(
        KIND, products[0], missing, (3,), 64
    )


def test_the_check_needs_a_gpu_of_its_own(capsys):
    assert mosaic_check.main(["[]"]) == 1
    assert "no GPU of compute capability 8.0 to 9.0" in capsys.readouterr().out
