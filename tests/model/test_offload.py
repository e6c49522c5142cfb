"""Blocks that wait in hosts' memory give what blocks on the devices give."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import glm_jax
from glm_jax.checkpoints import layer_assembly, model_folder
from glm_jax.checkpoints.model_folder import save_model
from glm_jax.engine.engine import Engine, EngineSettings
from glm_jax.engine.prompt import Prompt
from glm_jax.engine.request import Request
from glm_jax.generation.driver import complete_all
from glm_jax.model import params as glm_params
from glm_jax.model.device_layout import PrecisionError, prepare
from glm_jax.model.layer_stacks import as_layers
from glm_jax.model.streamed_layers import HOST_MEMORY, OffloadedLayers, OffloadError, device_bytes
from glm_jax.sharding import make_mesh

LAYERS = 6
GIB = 2**30


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_model):
    config = tiny_model[0].replace(num_layers=LAYERS)
    folder = tmp_path_factory.mktemp("offload") / "model"
    save_model(folder, config, glm_params.init(config, jax.random.key(3)))
    return folder


def _limit(params, resident):
    """GiB for so many resident blocks, and two in flight."""
    of_layers = device_bytes(params.layers)
    streamed = device_bytes([x for x in jax.tree.leaves(params.layers) if x.ndim > 2]) // LAYERS
    rest = device_bytes(params) - LAYERS * streamed
    assert rest < of_layers
    return (rest + (resident + 2) * streamed) / GIB


def _logits(config, params):
    tokens = jnp.arange(24).reshape(2, 12) % 200
    positions = jnp.arange(12)[None].repeat(2, 0)
    mask = jnp.tril(jnp.ones((2, 12, 12), bool))
    return np.asarray(
        jax.jit(glm_jax.forward, static_argnums=1)(params, config, tokens, positions, mask)
    )


def _answer(config, params, budget=None):
    engine = Engine(params, config, EngineSettings(2, 40, page_size=8, prefill_budget=budget))
    prompts = [Prompt((5, 6, 7, 8, config.special_tokens.gmask), None), Prompt((9, 241), None)]
    requests = [Request(prompt, max_tokens=9, end_tokens=()) for prompt in prompts]
    return sorted((c.request_id, tuple(c.tokens)) for c in complete_all(engine, requests))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "mesh", [None, pytest.param((1, 1, 4), marks=pytest.mark.slow), (2, 2, 2)], ids=str
)
@pytest.mark.parametrize(
    ("quantization", "resident"),
    [(None, 0), pytest.param(None, 2, marks=pytest.mark.slow), ("int4", 3)],
)
def test_streamed_blocks_give_the_same_logits_and_tokens(saved, mesh, quantization, resident):
    devices = None if mesh is None else make_mesh(mesh)
    config, params = glm_jax.restore(saved, devices, quantization=quantization)
    limit = _limit(params, resident)
    _, offloaded = glm_jax.restore(
        saved, devices, quantization=quantization, weight_memory_limit=limit
    )
    layers = offloaded.layers
    assert isinstance(layers, OffloadedLayers)
    assert (layers.resident_count, layers.streamed_count) == (resident, LAYERS - resident)
    kinds = {x.ndim > 2: x.sharding.memory_kind for x in jax.tree.leaves(layers.streamed)}
    assert kinds == {True: HOST_MEMORY, False: "device"}
    assert device_bytes(offloaded) <= limit * GIB
    with jax.set_mesh(devices) if devices is not None else jax.default_device(None):
        np.testing.assert_allclose(
            _logits(config, offloaded), _logits(config, params), rtol=1e-5, atol=1e-5
        )
    assert _answer(config, offloaded) == _answer(config, params)


def test_a_prefill_cut_by_layers_streams_too(saved):
    config, params = glm_jax.restore(saved)
    _, offloaded = glm_jax.restore(saved, weight_memory_limit=_limit(params, 2))
    assert _answer(config, offloaded, budget=3) == _answer(config, params)


def test_a_limit_that_all_fits_into_changes_nothing(saved):
    _, params = glm_jax.restore(saved, weight_memory_limit=1.0)
    assert isinstance(params.layers, glm_params.LayerParams)


def _is_placed_as(x, stack):
    place = NamedSharding(stack.sharding.mesh, PartitionSpec(*stack.sharding.spec[1:]))
    return x.sharding.is_equivalent_to(place, x.ndim)


def test_on_other_devices_than_cpus_blocks_come_apart(saved, monkeypatch, tmp_path):
    """Each in arrays of its own as the engine runs them, and never in a stack besides."""
    mesh = make_mesh((1, 2, 4))
    config, stacked = glm_jax.restore(saved, mesh)
    monkeypatch.setattr(layer_assembly, "_is_on_cpu", lambda layers: False)
    monkeypatch.setattr(model_folder, "_is_on_cpu", lambda described: False)
    _, params = glm_jax.restore(saved, mesh)
    assert isinstance(params.layers, tuple)
    for i, layer in enumerate(params.layers):
        of_stack = jax.tree.map(lambda x, i=i: x[i], stacked.layers)
        jax.tree.map(np.testing.assert_array_equal, layer, of_stack)
        places = jax.tree.map(_is_placed_as, layer, stacked.layers)
        assert jax.tree.all(places), places
    assert prepare(params) is params
    save_model(tmp_path / "again", config, params)
    monkeypatch.undo()
    again = glm_jax.restore(tmp_path / "again", mesh)[1]
    jax.tree.map(np.testing.assert_array_equal, again, stacked)


@pytest.mark.parametrize("quantization", [None, "int4"])
def test_on_other_devices_than_cpus_blocks_are_stacked_if_asked(saved, monkeypatch, quantization):
    mesh = make_mesh((1, 2, 4))
    stack = glm_jax.restore(saved, mesh, quantization=quantization)[1].layers
    monkeypatch.setattr(layer_assembly, "_is_on_cpu", lambda layers: False)
    monkeypatch.setattr(model_folder, "_is_on_cpu", lambda described: False)
    _, params = glm_jax.restore(saved, mesh, quantization=quantization, is_stacked=True)
    cuts = [(0, 1), (1, 4), (4, LAYERS)]
    parts = (layer_assembly.Part(*cut, as_layers(params.layers).stacked(*cut)) for cut in cuts)
    again = layer_assembly.gathered(parts, LAYERS, 0, math.inf, is_stacked=True)
    for found in (params.layers, again):
        jax.tree.map(np.testing.assert_array_equal, found, stack)
        same = jax.tree.map(
            lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), found, stack
        )
        assert jax.tree.all(same), same


def test_a_limit_below_two_blocks_is_refused(saved):
    with pytest.raises(OffloadError, match=r"weight_memory_limit=1e-06: at least 0\.0\d GiB"):
        glm_jax.restore(saved, weight_memory_limit=1e-6)


def test_few_bits_of_activations_need_all_weights(saved):
    _, params = glm_jax.restore(saved)
    _, offloaded = glm_jax.restore(saved, weight_memory_limit=_limit(params, 0))
    with pytest.raises(PrecisionError, match="all weights"):
        prepare(offloaded, activation_bits=8)
