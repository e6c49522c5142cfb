"""--checkpoint=random:SIZE, where launchers expect a model folder."""

from types import SimpleNamespace

import pytest

from glm_jax.errors import UserError
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
    flags.adapter = "somewhere"
    with pytest.raises(UserError, match="random weights take no adapter"):
        model_flags.load_model(None)
    flags.tokenizer = str(tokenizer.files[0])
    with pytest.raises(UserError, match="does not fit the model"):
        model_flags.load_tokenizer()
    flags.checkpoint = "random:7b"
    for load in (model_flags.model_config, model_flags.load_tokenizer):
        with pytest.raises(UserError, match="one of tiny, 125m"):
            load()
