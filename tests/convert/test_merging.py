"""Adapters merged into a model, whatever it is written as."""

import shutil

import jax
import numpy as np
import pytest
from conftest import GOLDEN, NUM_HEADS

import glm_jax
from convert.conversion import Options, convert_shards
from convert.errors import ConvertError
from convert.merging import write_merged
from convert.model_readers import open_model
from convert.sat_writer import write_shards
from convert.verify import compare
from glm_jax.checkpoints.adapter_folder import model_identity, save_adapter
from glm_jax.checkpoints.model_folder import load_config
from glm_jax.checkpoints.parameter_files import CheckpointError
from glm_jax.files import OutputError
from glm_jax.model import adapters as model_adapters
from glm_jax.model.adapters import AdapterConfig
from glm_jax.model.params import init_of
from glm_jax.tokenizer import TokenizerError

ADAPTER = AdapterConfig(rank=3, alpha=6.0, targets=("query_key_value", "dense_h_to_4h"))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The oracle's model as a folder, and adapters of it."""
    folder = tmp_path_factory.mktemp("merging")
    options = Options(num_heads=NUM_HEADS, max_sequence_length=64)
    convert_shards(str(GOLDEN / "checkpoints" / "tp2"), folder / "model", options)
    config = load_config(folder / "model")
    pairs = init_of(model_adapters.specs(config, ADAPTER), jax.random.key(0), None)
    pairs = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(1), x.shape), pairs)
    save_adapter(folder / "adapter", ADAPTER, pairs, model_identity(folder / "model", config))
    return folder


def test_all_ways_to_merge_agree(converted, tmp_path):
    write_merged(converted / "model", converted / "adapter", tmp_path / "merged")
    _, beside = glm_jax.restore(converted / "model", adapter=converted / "adapter")
    config, merged = glm_jax.restore(tmp_path / "merged")
    kernel, expected = merged.layers.query_key_value.kernel, beside.layers.query_key_value.kernel
    down, up = (np.asarray(x, np.float64) for x in (expected.pair.down, expected.pair.up))
    sum_of = np.asarray(expected.frozen, np.float64) + 2 * np.einsum("lir,lr...->li...", down, up)
    # The pairs that lie beside were rounded to float16, and so is the sum.
    np.testing.assert_allclose(np.asarray(kernel, np.float64), sum_of, rtol=2e-3, atol=2e-4)
    np.testing.assert_array_equal(merged.layers.dense.kernel, beside.layers.dense.kernel)
    assert config == load_config(converted / "model")
    write_shards(converted / "model", tmp_path / "direct", 2, adapter=converted / "adapter")
    write_shards(tmp_path / "merged", tmp_path / "after", 2)
    assert (tmp_path / "direct" / "latest").read_text() == "49300"
    models = [open_model(tmp_path / name, NUM_HEADS) for name in ("direct", "after", "merged")]
    for other in models[1:]:
        assert all(difference is None for difference in compare(models[0], other))
    assert any(d is not None for d in compare(models[0], open_model(converted / "model")))


def test_released_shards_take_adapters_as_they_are(converted, tmp_path):
    """The same model, before it was converted."""
    shards = GOLDEN / "checkpoints" / "tp2"
    with pytest.raises(OutputError, match="is not empty"):
        write_merged(shards, converted / "adapter", converted / "model")
    write_shards(converted / "model", tmp_path / "a", 4, adapter=converted / "adapter")
    again = Options(num_heads=NUM_HEADS, max_sequence_length=64)
    convert_shards(str(tmp_path / "a"), tmp_path / "b", again)
    config, _ = glm_jax.restore(tmp_path / "b", quantization="int4")
    assert config.num_layers == load_config(converted / "model").num_layers


def test_integers_and_other_models_are_refused(converted, tmp_path):
    int4 = Options(num_heads=NUM_HEADS, max_sequence_length=64, quantization="int4")
    convert_shards(str(GOLDEN / "checkpoints" / "tp2"), tmp_path / "int4", int4)
    with pytest.raises(ConvertError, match="cannot be merged into int4 weights"):
        write_merged(tmp_path / "int4", converted / "adapter", tmp_path / "out")
    # Beside the integers they may stay: it is the same model.
    glm_jax.restore(tmp_path / "int4", adapter=converted / "adapter")
    with pytest.raises(CheckpointError, match="holds no adapters"):
        write_merged(converted / "model", tmp_path / "int4", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_tokenizer_that_cannot_be_read_is_not_left_out(converted, tmp_path):
    shutil.copytree(converted / "model", tmp_path / "model")
    (tmp_path / "model" / "tokenizer.model").write_bytes(b"garbled")
    with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
        write_merged(tmp_path / "model", converted / "adapter", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_sum_beyond_the_dtype_is_refused(converted, tmp_path):
    config = load_config(converted / "model")
    pairs = init_of(model_adapters.specs(config, ADAPTER), jax.random.key(0), None)
    huge = jax.tree.map(lambda x: 0 * x + 300.0, pairs)
    identity = model_identity(converted / "model", config)
    save_adapter(tmp_path / "huge", ADAPTER, huge, identity)
    with pytest.raises(ConvertError, match=r"layer 0, query_key_value: .* beyond float16"):
        write_merged(converted / "model", tmp_path / "huge", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
