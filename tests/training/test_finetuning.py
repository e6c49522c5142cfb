"""A model learns from instructions, by adapters or as a whole, and goes on where it stopped."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import save_tiny

from glm_jax import restore
from glm_jax.training.finetuning import default_config, finetune


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("base") / "model"
    save_tiny(folder, tokenizer)
    return folder


@pytest.fixture
def experiment(tmp_path, corpus):
    """A small run: pairs of both languages, long targets and short ones."""
    lines = [{"prompt": q.text, "target": q.answer} for q in corpus.questions[:40]] + [
        {"prompt": f"Say it: {q.answer}", "target": q.text.replace("[MASK]", q.answer)}
        for q in corpus.questions[-40:]
    ]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "pairs.jsonl").write_text(text, encoding="utf-8")
    config = default_config(rank=4, dropout=0.1)
    config.model.compute_dtype = "float32"
    config.data.files = str(tmp_path / "pairs.jsonl")
    config.data.sequence_length, config.data.batch_size = 48, 4
    config.optimizer.learning_rate = 1e-2
    config.optimizer.remat = "none"
    config.steps, config.log_every, config.checkpoint_every = 16, 4, 4
    return config


@pytest.mark.parametrize("quantization", ["", "int8", "int4,group=32"])
def test_adapters_learn_beside_a_frozen_model(experiment, base, tmp_path, quantization):
    experiment.quantization = quantization
    history = finetune(experiment, base, tmp_path / "run")
    losses = [line["loss"] for line in history]
    assert losses[-1] < losses[0] - 0.5, losses
    adapter = tmp_path / "run" / "adapter"
    plain, adapted = (
        restore(base, quantization=quantization or None, adapter=a)[1] for a in (None, adapter)
    )
    kernel = adapted.layers.dense.kernel
    assert kernel.pair.up.shape == (2, 4, 128)
    assert float(jnp.max(jnp.abs(kernel.pair.up))) > 0
    jax.tree.map(np.testing.assert_array_equal, kernel.frozen, plain.layers.dense.kernel)
