"""The same parameters give the same results on every mesh, and one module knows its axes."""

import ast
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from glm_jax import make_mesh
from glm_jax.generation.generate import generate
from glm_jax.model import glm
from glm_jax.model import params as glm_params
from glm_jax.model.visibility import Visibility
from glm_jax.quantization import QuantizedArray, Scheme
from glm_jax.sharding import (
    MESH_AXES,
    MeshError,
    mesh_to_divide,
    parameter_sharding,
    parse_mesh,
    surrounding_mesh,
)

MESHES = [(1, 1, 1), (2, 2, 2), (1, 1, 8)]


def _on(mesh, config, params):
    shardings = jax.tree.map(lambda a: a.sharding, glm_params.abstract(config, mesh))
    return jax.device_put(params, shardings)


@pytest.mark.parametrize("shape", MESHES)
def test_logits_are_the_same_on_every_mesh(tiny_model, shape):
    config, params = tiny_model
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (4, 16), np.int32)
    position_ids = np.broadcast_to(np.arange(16, dtype=np.int32), tokens.shape)
    visibility = Visibility.prefix(np.array([3, 5, 0, 16], np.int32), 16)
    forward = jax.jit(glm.forward, static_argnames="config")
    expected = forward(params, config, tokens, position_ids, visibility)
    mesh = make_mesh(shape)
    with jax.set_mesh(mesh):
        got = forward(_on(mesh, config, params), config, tokens, position_ids, visibility)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("shape", MESHES)
def test_decoding_is_the_same_on_every_mesh(tiny_model, shape):
    config, params = tiny_model
    prompts = [[5, 6, 7, 241], [9, 240, 11, 12, 13], [1, 2, 241], [3, 241]]
    expected = generate(params, config, prompts, max_length=20)
    mesh = make_mesh(shape)
    assert generate(_on(mesh, config, params), config, prompts, max_length=20) == expected


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_parameters_shard_like_float_ones(tiny_model, bits, tmp_path):
    from glm_jax import restore, save_model

    config, params = tiny_model
    quantized = glm_params.quantize_params(params, Scheme(bits))
    save_model(tmp_path / "model", config, quantized)
    _, sharded = restore(tmp_path / "model", mesh=make_mesh((1, 1, 8)))
    kernel = sharded.layers.dense_4h_to_h.kernel
    assert isinstance(kernel, QuantizedArray)
    assert kernel.values.addressable_shards[0].data.shape[1] == kernel.values.shape[1] // 8
    prompts = [[5, 6, 7, 241]]
    expected = generate(quantized, config, prompts, max_length=16)
    assert generate(sharded, config, prompts, max_length=16) == expected


@pytest.mark.parametrize("quantization", [None, "int4"])
def test_no_mesh_and_a_mesh_of_one_device_restore_and_prepare_the_same(
    tiny_model, quantization, tmp_path
):
    from glm_jax import restore, save_model
    from glm_jax.model.device_layout import prepare

    config, params = tiny_model
    save_model(tmp_path / "model", config, params)
    restored = [
        restore(tmp_path / "model", mesh=mesh, quantization=quantization)[1]
        for mesh in (None, make_mesh((1, 1, 1)))
    ]
    jax.tree.map(np.testing.assert_array_equal, *restored)
    # The layout of one CPU's kernel is for parameters without a mesh; what it gives is the same.
    answers = [generate(prepare(p), config, [[5, 6, 7, 241]], max_length=16) for p in restored]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1, 16), "needs 16 devices, there are 8"),
        ((3, 1, -1), "do not divide by 3"),
        ((1, 1), "three positive sizes"),
        ((0, 1, 1), "three positive sizes"),
        ((-1, -1, 1), "one may be -1"),
    ],
)
def test_impossible_meshes_are_refused(shape, message):
    with pytest.raises(MeshError, match=message):
        make_mesh(shape)


def test_mesh_flag():
    assert parse_mesh("2,-1,2").shape == {"data": 2, "fsdp": 2, "tensor": 2}
    with pytest.raises(MeshError, match="three integers"):
        parse_mesh("all")


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(MeshError, match="heads=6 does not divide"):
        parameter_sharding(make_mesh((1, 1, 4)), ("heads",), (6,))


def test_a_mesh_of_one_device_is_none():
    assert surrounding_mesh() is None
    with jax.set_mesh(make_mesh((1, 1, 1))):
        assert surrounding_mesh() is None
    mesh = make_mesh((1, 2, 4))
    with jax.set_mesh(mesh):
        assert surrounding_mesh() == mesh_to_divide() == jax.sharding.get_abstract_mesh()
        apart = []
        jax.shard_map(
            lambda x: apart.append((surrounding_mesh(), mesh_to_divide())) or x,
            in_specs=PartitionSpec("tensor"),
            out_specs=PartitionSpec("tensor"),
        )(np.zeros(8))
        [(within, to_divide)] = apart
    assert within.shape == mesh.shape
    assert to_divide is None


def _names_a_mesh_axis(node):
    """A literal of a mesh axis; "data" is one only where a mesh's shape is asked for it."""
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        of_shape = isinstance(node.value, ast.Attribute) and node.value.attr == "shape"
        return of_shape and node.slice.value in MESH_AXES
    return isinstance(node, ast.Constant) and node.value in ("fsdp", "tensor")


def test_mesh_axes_are_known_in_sharding_alone():
    root = Path(__file__).parent.parent
    for path in (p for top in ("glm_jax", "launch", "convert") for p in (root / top).rglob("*.py")):
        if path == root / "glm_jax" / "sharding.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            assert not _names_a_mesh_axis(node), f"{path}:{node.lineno} names a mesh axis"
            is_shard_map = isinstance(node, ast.Attribute) and node.attr == "shard_map"
            assert not is_shard_map, f"{path}:{node.lineno}: sharding.per_device"
