"""Models of random weights have the form of restored ones, and no more than a layer beside it."""

import jax
import numpy as np
import pytest

from glm_jax.checkpoints import random_weights
from glm_jax.checkpoints.random_weights import random_config, random_model, random_params
from glm_jax.config import ConfigError, glm_130b, glm_config
from glm_jax.model import params as glm_params
from glm_jax.model.streamed_layers import OffloadedLayers
from glm_jax.quantization import QuantizationError, QuantizedArray, Scheme, unpack_int4
from glm_jax.sharding import MeshError, make_mesh
from glm_jax.tokenizer import byte_tokenizer

SCHEMES = [None, "int8", "int4,group=32,zero_point"]


def _form(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype.name), tree)


@pytest.mark.parametrize("quantization", SCHEMES)
def test_the_form_is_that_of_a_restored_model(quantization):
    config, params = random_model("random:tiny", dtype="bfloat16", quantization=quantization)
    expected = glm_params.abstract(config)
    if quantization is not None:
        quantize = lambda p: glm_params.quantize_params(p, Scheme.parse(quantization))
        expected = jax.eval_shape(quantize, expected)
    assert _form(params) == _form(expected)  # axes and bits too, which are of the structure
    for linear in (params.layers.query_key_value, params.layers.dense_4h_to_h):
        kernel = linear.kernel
        if not isinstance(kernel, QuantizedArray):
            continue
        values = kernel.values if kernel.bits == 8 else unpack_int4(kernel.values, -2)
        largest = 2 ** (kernel.bits - 1) - 1
        assert int(values.max()) == largest
        assert int(values.min()) == -largest - (kernel.zero_points is not None)
        assert not np.array_equal(values[0], values[1])  # layers differ


@pytest.mark.parametrize("quantization", ["int4"])
def test_the_same_weights_on_every_mesh_where_restored_ones_lie(quantization):
    _, alone = random_model("random:tiny", quantization=quantization)
    mesh = make_mesh((1, 2, 2))
    config, divided = random_model("random:tiny", mesh, quantization=quantization)
    jax.tree.map(np.testing.assert_array_equal, alone, divided)
    expected = random_weights.described_params(
        config, mesh, quantization and Scheme.parse(quantization)
    )
    shardings = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
    assert shardings(divided) == shardings(expected)
    assert next(iter(divided.word_embeddings.addressable_shards)).data.size * 4 == (
        config.vocab_size * config.hidden_size
    )


def test_layers_beyond_a_limit_wait_in_the_hosts_memory():
    small = glm_config("tiny", num_layers=4, hidden_size=32, inner_hidden_size=64, vocab_size=64)
    params = random_params(small, quantization="int4", weight_memory_limit=3.2e-5)
    assert isinstance(params.layers, OffloadedLayers)
    assert 0 < params.layers.streamed_count <= 4
    assert params.layers.resident_count + params.layers.streamed_count == 4


def test_names():
    assert random_config("random:130b") == glm_130b()
    assert random_config("random:1b") == glm_config("1b")
    assert random_config("random:tiny").special_tokens.eop == 509
    with pytest.raises(ConfigError, match="model size '7b': one of tiny, 125m"):
        random_config("random:7b")
    with pytest.raises(QuantizationError, match="begin with int8 or int4"):
        random_model("random:tiny", quantization="int2")
    with pytest.raises(MeshError, match="does not divide"):
        random_model("random:tiny", make_mesh((1, 1, 8)))


@pytest.mark.parametrize("size", ["tiny", "130b"])
def test_bytes_stand_in_for_a_tokenizer(size):
    config = random_config(f"random:{size}")
    tokenizer = byte_tokenizer(config.special_tokens, config.vocab_size)
    text = "Blank [MASK] and 空白\n[gMASK]"
    ids = tokenizer.encode(text)
    assert max(ids) < config.vocab_size
    assert config.special_tokens.mask in ids
    assert "空白\n" in tokenizer.decode(ids)
    assert tokenizer.decode([400]) == "<|400|>"
    assert tokenizer.vocab_size <= config.vocab_size
