"""Adapters beside kernels give what kernels give that they are merged into."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn_adapters import drawn, merged, save_drawn
from jax.sharding import SingleDeviceSharding

import glm_jax
from glm_jax.checkpoints.adapter_folder import (
    identity_of,
    load_adapter,
    model_identity,
    save_adapter,
)
from glm_jax.checkpoints.checksums import write_checksums
from glm_jax.checkpoints.model_folder import save_model
from glm_jax.checkpoints.parameter_files import CheckpointError
from glm_jax.config import ConfigError
from glm_jax.files import OutputError
from glm_jax.kernels.quantized_matmul.cpu import TiledArray
from glm_jax.model import adapters as model_adapters
from glm_jax.model.adapters import (
    AdapterConfig,
    adapter_count,
    attach,
    attach_several,
)
from glm_jax.model.device_layout import prepare
from glm_jax.model.layer_stacks import split, unstack_layers
from glm_jax.model.layers import Dropout
from glm_jax.model.params import init_of, quantize_params
from glm_jax.model.streamed_layers import HOST_MEMORY, OffloadedLayers
from glm_jax.model.training import training_hidden
from glm_jax.model.visibility import Visibility
from glm_jax.quantization import Scheme
from glm_jax.sharding import make_mesh

ADAPTER = AdapterConfig(rank=4, alpha=6.0)
SOME = AdapterConfig(rank=3, targets=("dense", "query_key_value"))


def _logits(params, config, adapter_ids=None):
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 200)
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((12, 12), bool)), (2, 12, 12))
    forward = jax.jit(glm_jax.forward, static_argnums=1)
    return np.asarray(forward(params, config, tokens, positions, mask, adapter_ids))


@pytest.mark.parametrize(
    ("adapter", "scheme", "form"),
    [
        (ADAPTER, None, "apart"),
        (ADAPTER, Scheme(8), "stacked"),
        (SOME, Scheme(4, 32, zero_point=True), "stacked"),
        (SOME, None, "prepared"),
        (ADAPTER, Scheme(4, 32), "prepared"),
    ],
)
def test_logits_are_those_of_merged_kernels(tiny_model, adapter, scheme, form):
    config, params = tiny_model
    params = params if scheme is None else quantize_params(params, scheme)
    pairs = drawn(config, adapter)
    expected = _logits(merged(params, pairs, adapter.scale), config)
    adapted = attach(params, pairs, adapter.scale)
    if form == "apart":
        adapted = attach(unstack_layers(params), pairs, adapter.scale)
    if form == "prepared":
        adapted = prepare(adapted)
        assert isinstance(adapted.layers[0].dense.kernel.frozen, TiledArray)
    np.testing.assert_allclose(_logits(adapted, config), expected, atol=2e-4)
    assert np.max(np.abs(expected - _logits(params, config))) > 0.05


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("scheme", "form", "shape"),
    [
        (Scheme(8), "apart", None),
        (Scheme(4, 32), "prepared", None),
        (None, "streamed", None),
        (Scheme(4, 32), "stacked", (2, 2, 2)),
    ],
)
def test_each_token_uses_its_own_of_several_adapters(tiny_model, scheme, form, shape):
    config, params = tiny_model
    params = params if scheme is None else quantize_params(params, scheme)
    mesh = None if shape is None else make_mesh(shape)
    several = [(each, drawn(config, each, mesh, seed)) for seed, each in ((5, ADAPTER), (8, SOME))]
    alone = [_logits(params, config)]
    alone += [_logits(attach(params, pairs, each.scale), config) for each, pairs in several]
    form_of = {"apart": unstack_layers, "streamed": _offloaded}.get(form, lambda x: x)
    adapted = attach_several(form_of(params), several, "float32")
    adapted = prepare(adapted) if form == "prepared" else adapted
    assert adapter_count(adapted) == 2
    ids = np.repeat([[2], [1]], 12, axis=1)
    with jax.set_mesh(mesh or make_mesh((1, 1, 1))):
        got = _logits(adapted, config, ids)
        of_base = _logits(adapted, config)
    np.testing.assert_allclose(of_base, alone[0], atol=2e-4)
    np.testing.assert_allclose(got, [alone[2][0], alone[1][1]], atol=2e-4)
    assert np.max(np.abs(alone[1] - alone[2])) > 0.05
    # Those of one row may differ, as those of prompts that are prefilled together do.
    mixed = np.array([[0, 2] * 6, [1] * 12])
    if form == "stacked":
        with jax.set_mesh(mesh or make_mesh((1, 1, 1))):
            got = _logits(adapted, config, mixed)
        np.testing.assert_allclose(got[1], alone[1][1], atol=2e-4)
        np.testing.assert_allclose(got[0, 0], alone[0][0, 0], atol=2e-4)


def test_fresh_adapters_change_nothing(tiny_model):
    config, params = tiny_model
    pairs = init_of(model_adapters.specs(config, ADAPTER), jax.random.key(0), None)
    got = _logits(attach(params, pairs, ADAPTER.scale), config)
    np.testing.assert_array_equal(got, _logits(params, config))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "scheme", "remat"),
    [
        ((1, 1, 1), None, "none"),
        ((1, 1, 1), Scheme(4, 32), "blocks"),
        ((1, 1, 8), Scheme(4, 32), "blocks"),
        ((2, 2, 2), Scheme(8), "none"),
    ],
)
def test_gradients_are_the_chain_rules(tiny_model, shape, scheme, remat):
    """Of merged float kernels, whose gradient is taken apart by hand."""
    config, params = tiny_model
    params = params if scheme is None else quantize_params(params, scheme)
    pairs, scale = drawn(config, ADAPTER), ADAPTER.scale
    tokens = jax.random.randint(jax.random.key(1), (4, 12), 0, 200)
    positions = jnp.broadcast_to(jnp.arange(12), (4, 12))
    ones = jnp.ones((4, 12), jnp.int32)

    def loss(params):
        visible = Visibility.packed(ones, 5 * ones)
        hidden, _ = training_hidden(params, config, tokens, positions, visible, remat)
        return jnp.sum(jnp.sin(3 * hidden))

    whole = jax.jit(jax.grad(loss))(merged(params, pairs, scale))
    with jax.set_mesh(make_mesh(shape)):
        got = jax.jit(jax.grad(lambda p: loss(attach(params, p, scale))))(pairs)
    for name, pair in pairs.pairs.items():
        of_kernel = getattr(whole.layers, name).kernel
        flat = of_kernel.reshape(*of_kernel.shape[:2], -1)
        up = pair.up.reshape(*pair.up.shape[:2], -1)
        of_down = scale * jnp.einsum("lio,lro->lir", flat, up, precision="highest")
        of_up = scale * jnp.einsum("lir,lio->lro", pair.down, flat, precision="highest")
        np.testing.assert_allclose(got.pairs[name].down, of_down, rtol=2e-3, atol=2e-3)
        of_up = of_up.reshape(pair.up.shape)
        np.testing.assert_allclose(got.pairs[name].up, of_up, rtol=2e-3, atol=2e-3)


def test_dropout_is_of_what_adapters_take_alone(tiny_model):
    config, params = tiny_model
    tokens = jnp.arange(12)[None]
    ones = jnp.ones((1, 12), jnp.int32)

    def hidden(pairs, rate):
        visible = Visibility.packed(ones, 5 * ones)
        dropout = Dropout(jax.random.key(0), 0.0, 0.0, rate)
        model = attach(params, pairs, ADAPTER.scale)
        return training_hidden(model, config, tokens, tokens, visible, dropout=dropout)[0]

    fresh = init_of(model_adapters.specs(config, ADAPTER), jax.random.key(0), None)
    np.testing.assert_array_equal(hidden(fresh, 0.5), hidden(fresh, 0.0))
    pairs = drawn(config, ADAPTER)
    assert np.max(np.abs(hidden(pairs, 0.5) - hidden(pairs, 0.0))) > 0.01


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_model):
    """A model folder, and adapters of it."""
    config, params = tiny_model
    folder = tmp_path_factory.mktemp("adapted")
    save_model(folder / "model", config, params)
    pairs = drawn(config, ADAPTER)
    save_adapter(folder / "adapter", ADAPTER, pairs, model_identity(folder / "model", config))
    return folder, pairs


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "quantization"), [(None, None), (None, "int4"), ((2, 2, 2), "int4")]
)
def test_a_model_is_restored_with_its_adapters(saved, shape, quantization):
    folder, pairs = saved
    mesh = None if shape is None else make_mesh(shape)
    config, params = glm_jax.restore(folder / "model", quantization=quantization)
    expected = _logits(attach(params, pairs, ADAPTER.scale), config)
    adapter = folder / "adapter"
    got_config, got = glm_jax.restore(
        folder / "model", mesh, quantization=quantization, adapter=adapter
    )
    with jax.set_mesh(mesh or make_mesh((1, 1, 1))):
        np.testing.assert_allclose(_logits(got, got_config), expected, atol=3e-4)


def test_blocks_that_wait_on_the_host_have_theirs_on_the_device(saved):
    folder, pairs = saved
    config, params = glm_jax.restore(folder / "model")
    expected = _logits(attach(params, pairs, ADAPTER.scale), config)
    params = attach(_offloaded(params), pairs, ADAPTER.scale)
    np.testing.assert_allclose(_logits(params, config), expected, atol=3e-4)


def _offloaded(params):
    """The second of two blocks on the host."""
    place = SingleDeviceSharding(jax.devices()[0], memory_kind=HOST_MEMORY)
    cut = lambda first: jax.tree.map(lambda x: x[first : first + 1], params.layers)
    streamed = jax.tree.map(lambda x: jax.device_put(x, place) if x.ndim > 2 else x, cut(1))
    return params.replace(layers=OffloadedLayers(split(cut(0)), streamed))


def test_several_are_restored_by_name(saved, tmp_path):
    folder, pairs = saved
    model, loud = folder / "model", save_drawn(tmp_path / "loud", folder / "model", SOME, 8)
    paths = {"quiet": folder / "adapter", "loud": tmp_path / "loud"}
    config, params = glm_jax.restore(model, adapter=paths)
    expected = attach_several(
        glm_jax.restore(model)[1], [(ADAPTER, pairs), (SOME, loud)], "float32"
    )
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    with pytest.raises(CheckpointError, match=r"adapter gone: .*holds no adapters"):
        glm_jax.restore(model, adapter={"gone": tmp_path})
    about = json.loads((tmp_path / "loud" / "adapter.json").read_text())
    about["model"]["num_heads"] = 3
    other = dict(about.pop("model"))
    save_adapter(tmp_path / "other", SOME, loud, other)
    broken = jax.tree.map(lambda x: x.at[0, 0].set(np.nan), loud)
    save_adapter(tmp_path / "broken", SOME, broken, model_identity(model, config))
    for name, message in (("other", "another model than this one"), ("broken", "NaN or infinite")):
        with pytest.raises(CheckpointError, match=f"adapter {name}: .*{message}"):
            glm_jax.restore(model, adapter=paths | {name: tmp_path / name})


def test_paths_may_be_relative(saved, tiny_model, monkeypatch):
    folder, _ = saved
    monkeypatch.chdir(folder)
    expected = model_identity(folder / "model", tiny_model[0])
    assert model_identity(Path("model"), tiny_model[0]) == expected
    assert glm_jax.restore("model", adapter="adapter")[0].num_layers == tiny_model[0].num_layers


def test_adapters_of_another_model_are_refused(saved, tiny_model, tmp_path):
    folder, _ = saved
    config, params = tiny_model
    norm = params.final_layernorm
    other = identity_of(config, norm.replace(bias=norm.bias + 1))
    with pytest.raises(CheckpointError, match=r"another model than this one \(final_layernorm"):
        load_adapter(folder / "adapter", config, other, None)
    wider = other | {"num_layers": 70}
    with pytest.raises(CheckpointError, match=r"\(num_layers differs\)"):
        load_adapter(folder / "adapter", config, wider, None)
    with pytest.raises(CheckpointError, match="holds no adapters"):
        glm_jax.restore(folder / "model", adapter=tmp_path)
    with pytest.raises(OutputError, match="is not empty"):
        save_adapter(folder / "adapter", ADAPTER, drawn(config, ADAPTER), other)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter.json").write_text('{"rank": 0}')
    write_checksums(broken, [broken / "adapter.json"], {})
    with pytest.raises(CheckpointError, match="save the adapters again"):
        glm_jax.restore(folder / "model", adapter=broken)


@pytest.mark.parametrize(
    "fields",
    [
        {"rank": 0},
        {"dropout": 1.0},
        {"targets": ("dense", "dense")},
        {"targets": ("mlp",)},
        {"targets": ()},
    ],
)
def test_adapters_that_cannot_be_are_refused(fields):
    with pytest.raises(ConfigError, match=f"adapter.{next(iter(fields))}="):
        dataclasses.replace(ADAPTER, **fields)
