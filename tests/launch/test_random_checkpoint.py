"""Models that flags name: --checkpoint=random:SIZE, and --draft_checkpoint."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from glm_jax.checkpoints.model_folder import save_model
from glm_jax.config import glm_config
from glm_jax.errors import UserError
from glm_jax.model import params as glm_params
from launch import model_flags


@pytest.fixture
def flags(monkeypatch):
    names = ("tokenizer", "dtype", "adapter", "weight_memory_limit", "cache_dtype")
    names += ("activation_bits", "embedding_bits")
    given = SimpleNamespace(checkpoint="random:tiny", quantization="int4", **dict.fromkeys(names))
    monkeypatch.setattr(model_flags, "FLAGS", given)
    return given


def test_they_are_loaded_and_it_is_said_that_answers_mean_nothing(flags, capsys):
    config, _ = model_flags.load_model(None)
    tokenizer = model_flags.load_tokenizer()
    assert "random:tiny: random weights: the answers mean nothing" in capsys.readouterr().err
    assert model_flags.model_config() == config
    assert max(tokenizer.encode("[gMASK]")) < config.vocab_size


def test_what_does_not_go_with_them(flags, tokenizer):
    flags.adapter = ["somewhere"]
    with pytest.raises(UserError, match="random weights take no adapter"):
        model_flags.load_model(None)
    flags.tokenizer = str(tokenizer.files[0])
    with pytest.raises(UserError, match="does not fit the model"):
        model_flags.load_tokenizer()
    flags.checkpoint = "random:7b"
    for load in (model_flags.model_config, model_flags.load_tokenizer):
        with pytest.raises(UserError, match="one of tiny, 125m"):
            load()


def test_a_draft_model(flags, tokenizer, tmp_path):
    flags.draft_checkpoint, flags.speculate = None, 2
    assert model_flags.load_small_model(None, tokenizer) is None
    size = -(-tokenizer.vocab_size // 64) * 64
    config = glm_config("tiny", vocab_size=size, special_tokens=tokenizer.special_tokens)
    params = glm_params.init(config, jax.random.key(0))
    folder = tmp_path / "small"
    save_model(folder, config, params, tokenizer.files)
    flags.draft_checkpoint = str(folder)
    small = model_flags.load_small_model(None, tokenizer)
    assert small.config == config
    np.testing.assert_array_equal(small.params.final_layernorm.scale, 1)
    flags.speculate = 0
    with pytest.raises(UserError, match="give --speculate"):
        model_flags.load_small_model(None, tokenizer)
    flags.speculate = 2
    other = tmp_path / "other.model"
    other.write_bytes(tokenizer.files[0].read_bytes() + b"\n\0")
    named = SimpleNamespace(special_tokens=tokenizer.special_tokens, vocab_size=9, files=(other,))
    with pytest.raises(UserError, match=r"another tokenizer than .*other\.model"):
        model_flags.load_small_model(None, named)
    flags.draft_checkpoint = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere"):
        model_flags.load_small_model(None, tokenizer)
