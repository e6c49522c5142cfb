"""A model learns from instructions, by adapters or as a whole, and goes on where it stopped."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import StopError, broken_at, save_tiny

from glm_jax import restore
from glm_jax.checkpoints.model_folder import save_model
from glm_jax.checkpoints.parameter_files import CheckpointError
from glm_jax.config import ConfigError
from glm_jax.data.records import DataError
from glm_jax.training.curves import draw, read
from glm_jax.training.finetuning import default_config, finetune, outcome

# What all of them go through is tested by one of each kind in every run.
_SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("base") / "model"
    save_tiny(folder, tokenizer)
    return folder


@pytest.fixture
def experiment(tmp_path, corpus):
    """A small run of pairs in both languages, whose targets are short and long."""
    pairs = [(q.text, q.answer) for q in corpus.questions[:40]]
    pairs += [
        (f"说说{q.answer}", q.text.replace("[MASK]", q.answer)) for q in corpus.questions[-40:]
    ]
    lines = [json.dumps({"prompt": p, "target": t}, ensure_ascii=False) for p, t in pairs]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    config = default_config(rank=4, dropout=0.1)
    config.model.compute_dtype = "float32"
    config.data.files = str(tmp_path / "pairs.jsonl")
    config.data.sequence_length, config.data.batch_size = 48, 4
    config.optimizer.learning_rate, config.optimizer.remat = 3e-2, "none"
    config.steps, config.log_every, config.checkpoint_every = 24, 4, 8
    return config


def _losses(history):
    return [line["loss"] for line in history]


@pytest.mark.parametrize(
    "quantization",
    [pytest.param("", marks=_SLOW), pytest.param("int8", marks=_SLOW), "int4,group=32"],
)
def test_adapters_learn_beside_a_frozen_model(experiment, base, tmp_path, quantization, capsys):
    experiment.quantization = quantization
    history = finetune(experiment, base, tmp_path / "run")
    assert _losses(history)[-1] < _losses(history)[0] - 0.12
    assert "pairs: 80 records" in capsys.readouterr().err
    adapter = tmp_path / "run" / "adapter"
    plain, adapted = (
        restore(base, quantization=quantization or None, adapter=a)[1] for a in (None, adapter)
    )
    kernel = adapted.layers.dense.kernel
    assert kernel.pair.up.shape == (2, 4, 128)
    assert float(jnp.max(jnp.abs(kernel.pair.up))) > 0.01
    jax.tree.map(np.testing.assert_array_equal, kernel.frozen, plain.layers.dense.kernel)
    assert outcome(tmp_path / "run") == f"the adapters are in {adapter}"
    draw(read(tmp_path / "run"), tmp_path / "curves.png")
    assert finetune(experiment, base, tmp_path / "run") == []


@pytest.mark.parametrize(
    ("param_dtype", "compute_dtype", "moments", "offload"),
    [
        pytest.param("float32", "float16", "float32", False, marks=_SLOW),
        pytest.param("bfloat16", "bfloat16", "int8", True, marks=_SLOW),
        ("bfloat16", "float32", "factored", False),
        pytest.param("float32", "float32", "float32", True, marks=_SLOW),
    ],
)
def test_all_parameters_learn(
    experiment, base, tmp_path, param_dtype, compute_dtype, moments, offload, monkeypatch
):
    """And a run that broke off goes on to the same losses."""
    experiment.adapter.rank = 0
    experiment.model.update(param_dtype=param_dtype, compute_dtype=compute_dtype)
    experiment.optimizer.update(moments=moments, offload_moments=offload, learning_rate=1e-2)
    experiment.stability.loss_scaling = compute_dtype == "float16"
    losses = _losses(finetune(experiment, base, tmp_path / "run"))
    assert losses[-1] < losses[0] - 1
    config, params = restore(tmp_path / "run" / "model")
    assert config.param_dtype == param_dtype
    assert params.layers.dense.kernel.dtype == param_dtype
    assert config.special_tokens is not None
    with monkeypatch.context() as patched:
        broken_at(12, patched)
        with pytest.raises(StopError):
            finetune(experiment, base, tmp_path / "broken")
    assert _losses(finetune(experiment, base, tmp_path / "broken")) == losses[2:]


def test_a_run_goes_on_to_the_bit(experiment, base, tmp_path, monkeypatch):
    experiment.quantization = "int4"
    whole = _losses(finetune(experiment, base, tmp_path / "whole"))
    with monkeypatch.context() as patched:
        broken_at(12, patched)
        with pytest.raises(StopError):
            finetune(experiment, base, tmp_path / "broken")
    assert _losses(finetune(experiment, base, tmp_path / "broken")) == whole[2:]
    first, second = (
        restore(base, adapter=tmp_path / name / "adapter")[1] for name in ("whole", "broken")
    )
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [pytest.param("", marks=_SLOW), "int4"])
def test_a_run_is_the_same_on_every_mesh(experiment, base, tmp_path, quantization):
    experiment.quantization, experiment.adapter.dropout = quantization, 0.0
    runs = []
    for mesh in ("1,1,1", "2,2,2", "2,1,4"):
        experiment.mesh = mesh
        runs.append(_losses(finetune(experiment, base, tmp_path / mesh.replace(",", "x"))))
    for losses in runs[1:]:
        np.testing.assert_allclose(losses, runs[0], rtol=2e-3)


def test_held_out_pairs_are_scored(experiment, base, tmp_path):
    experiment.evaluation.files = experiment.data.files
    experiment.evaluation.update(every=12, batches=2)
    history = finetune(experiment, base, tmp_path / "run")
    held_out = [line["evaluation_loss"] for line in history if "evaluation_loss" in line]
    assert len(held_out) == 2
    assert held_out[1] < held_out[0]


def test_what_cannot_be_is_refused(experiment, base, tmp_path, tokenizer):
    def refused(error, match, checkpoint=base, workdir=tmp_path / "refused", **changes):
        changed = experiment.copy_and_resolve_references()
        changed.update_from_flattened_dict(changes)
        with pytest.raises(error, match=match):
            finetune(changed, checkpoint, workdir)

    refused(CheckpointError, "holds no model", tmp_path / "nowhere")
    whole = {"adapter.rank": 0, "quantization": "int4"}
    refused(ConfigError, "adapter.rank=0 trains all parameters", **whole)
    refused(
        ConfigError, "adapter.targets=mlp: expected one or more of", **{"adapter.targets": "mlp"}
    )
    refused(ConfigError, "from 8 to the model's 128", **{"data.sequence_length": 1024})
    refused(ConfigError, "kind='pairs'", **{"data.kind": "pairs"})
    refused(ConfigError, "optimizer.moments='fp8'", **{"optimizer.moments": "fp8"})
    refused(ConfigError, "is for all parameters", **{"optimizer.offload_moments": True})
    refused(ConfigError, "data.files is not set", **{"data.files": ""})
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "target": "b"}\n{"prompt": "a"}\n')
    refused(DataError, 'bad.jsonl:2: not a JSON object with "target"', **{"data.files": str(bad)})


def test_a_run_does_not_go_on_with_another_model(experiment, base, tmp_path, tokenizer):
    experiment.steps = 2
    finetune(experiment, base, tmp_path / "run")
    config, params = restore(base)
    norm = params.final_layernorm
    params = params.replace(final_layernorm=norm.replace(bias=norm.bias + 1))
    save_model(tmp_path / "other", config, params, tokenizer.files)
    with pytest.raises(ConfigError, match="a run of another model or precision"):
        finetune(experiment, tmp_path / "other", tmp_path / "run")
    experiment.quantization = "int8"
    with pytest.raises(ConfigError, match="a run of another model or precision"):
        finetune(experiment, base, tmp_path / "run")
