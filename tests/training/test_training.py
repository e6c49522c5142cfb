"""Training learns, goes on where it stopped, and refuses what cannot be."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorboardX

from glm_jax import restore
from glm_jax.config import ConfigError
from glm_jax.model import params as glm_params
from glm_jax.training import loop
from glm_jax.training.config import check, default_config
from glm_jax.training.loop import train
from glm_jax.training.optimizer import decay_mask, learning_rate, make_optimizer
from glm_jax.training.step import Batch, loss_fn


@pytest.fixture
def experiment(tmp_path, tokenizer, corpus):
    (tmp_path / "text.txt").write_text("\n".join(corpus.sentences[:200]), encoding="utf-8")
    config = default_config("tiny", hidden_size=32, inner_hidden_size=64, vocab_size=4096)
    config.data.files = str(tmp_path / "text.txt")
    config.data.tokenizer = str(tokenizer.files[0].parent)
    config.data.sequence_length, config.data.batch_size = 48, 4
    config.optimizer.learning_rate = 1e-2
    config.steps, config.log_every, config.checkpoint_every = 24, 4, 8
    return config


def test_loss_goes_down_and_the_model_restores(experiment, tmp_path):
    history = train(experiment, tmp_path / "run")
    losses = [h["loss"] for h in history]
    assert [h["step"] for h in history] == [4, 8, 12, 16, 20, 24]
    assert losses[-1] < losses[0] - 1
    config, params = restore(tmp_path / "run" / "model")
    assert config.special_tokens is not None
    assert glm_params.parameter_count(config) == sum(x.size for x in jax.tree.leaves(params))
    assert list((tmp_path / "run" / "tensorboard").iterdir())


class _StopError(Exception):
    pass


def test_a_resumed_run_equals_an_unbroken_one_to_the_bit(experiment, tmp_path, monkeypatch):
    unbroken = train(experiment, tmp_path / "whole")

    class Dying(tensorboardX.SummaryWriter):
        def add_scalar(self, name, value, step):
            if step == 12:
                raise _StopError

    with monkeypatch.context() as patched:
        patched.setattr(tensorboardX, "SummaryWriter", Dying)
        with pytest.raises(_StopError):
            train(experiment, tmp_path / "broken")
    resumed = train(experiment, tmp_path / "broken")
    assert resumed[0]["step"] == 12
    for got, expected in zip(resumed, unbroken[2:], strict=True):
        assert got["loss"] == expected["loss"]
        assert got["gradient_norm"] == expected["gradient_norm"]
    whole, broken = (restore(tmp_path / name / "model")[1] for name in ("whole", "broken"))
    jax.tree.map(np.testing.assert_array_equal, whole, broken)
    # Started once more, a finished run has nothing to do.
    assert train(experiment, tmp_path / "broken") == []


def test_a_run_goes_on_on_another_mesh(experiment, tmp_path, monkeypatch):
    expected = train(experiment, tmp_path / "one")
    experiment.steps = 12
    first = experiment.copy_and_resolve_references()
    first.mesh = "2,2,2"
    # Warm-up and decay are shares of all steps: keep those of the whole run.
    monkeypatch.setattr(loop, "make_optimizer", lambda config, _: make_optimizer(config, 24))
    sharded = train(first, tmp_path / "many")
    experiment.steps = 24
    experiment.mesh = "1,1,4"
    rest = train(experiment, tmp_path / "many")
    got = [h["loss"] for h in sharded + rest]
    np.testing.assert_allclose(got, [h["loss"] for h in expected], rtol=1e-3)


def test_loss_counts_targets_alone(tiny_model):
    config, params = tiny_model
    rng = np.random.default_rng(0)
    shape = (2, 16)
    batch = Batch(
        tokens=jnp.asarray(rng.integers(0, 200, shape, np.int32)),
        targets=jnp.asarray(rng.integers(0, 200, shape, np.int32)),
        loss_weights=jnp.asarray(np.arange(32).reshape(shape) % 3 == 0, jnp.float32),
        position_ids=jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), shape),
        context_length=jnp.full(shape, 5, jnp.int32),
        segment_ids=jnp.ones(shape, jnp.int32),
    )
    loss, _ = loss_fn(params, config, batch)
    elsewhere = batch.replace(targets=jnp.where(batch.loss_weights > 0, batch.targets, 7))
    assert loss == loss_fn(params, config, elsewhere)[0]
    nothing = batch.replace(loss_weights=jnp.zeros(shape))
    assert loss_fn(params, config, nothing)[0] == 0


def test_decay_spares_biases_and_layernorms(tiny_model):
    _, params = tiny_model
    mask = decay_mask(params)
    assert mask.word_embeddings
    assert mask.layers.dense.kernel
    assert not mask.layers.dense.bias
    assert not mask.layers.input_layernorm.scale
    assert not mask.final_layernorm.bias


def test_adamw_step_equals_the_formula():
    config = default_config("tiny").optimizer
    config.gradient_clip = 0.5
    optimizer = make_optimizer(config, 1000)
    params = glm_params.LinearParams(jnp.array([2.0]), jnp.array([2.0]))
    state = optimizer.init(params)
    gradient = glm_params.LinearParams(jnp.array([3.0]), jnp.array([4.0]))
    updates, state = optimizer.update(gradient, state, params)
    rate = float(learning_rate(config, 1000)(0))
    # Clipped by 10; the first Adam update is the gradient's sign.
    np.testing.assert_allclose(updates.kernel, -rate * (1 + 0.1 * 2.0), rtol=1e-4)
    np.testing.assert_allclose(updates.bias, -rate, rtol=1e-4)
    assert float(optax.global_norm(state[1][0].mu)) == pytest.approx(0.1 * 0.5, rel=1e-4)


def test_learning_rate_is_the_papers():
    rate = learning_rate(default_config("tiny").optimizer, 10_000)
    assert float(rate(0)) == pytest.approx(1e-7)
    assert float(rate(50)) == pytest.approx(8e-5)
    assert float(rate(25)) == pytest.approx((1e-7 + 8e-5) / 2)
    assert float(rate(10_000)) == pytest.approx(8e-6)
    assert float(rate(5025)) == pytest.approx((8e-5 + 8e-6) / 2)


def test_initial_values_are_deepnorms(tiny_model):
    config, params = tiny_model
    gain = (2 * config.num_layers) ** -0.5
    hidden, inner = config.hidden_size, config.inner_hidden_size
    qkv = np.asarray(params.layers.query_key_value.kernel)
    for i, scale in enumerate((1, 1, gain)):
        assert qkv[:, :, :, i].std() == pytest.approx(scale * hidden**-0.5, rel=0.03)
    expected = gain * (2 / (hidden + inner)) ** 0.5
    assert np.asarray(params.layers.dense_4h_to_h.kernel).std() == pytest.approx(expected, rel=0.03)
    assert not np.asarray(params.layers.dense_4h_to_h.bias).any()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "steps=0"),
        ("data.files", "", "data.files is not set"),
        ("data.sequence_length", 4096, "data.sequence_length=4096"),
        ("data.batch_size", 0, "data.batch_size=0"),
    ],
)
def test_impossible_experiments_are_refused(experiment, field, value, message):
    with experiment.unlocked():
        experiment.update_from_flattened_dict({field: value})
    with pytest.raises(ConfigError, match=message):
        check(experiment)


def test_a_vocabulary_too_small_for_the_tokenizer_is_refused(experiment, tmp_path):
    experiment.model.vocab_size = 512
    with pytest.raises(ConfigError, match=r"model\.vocab_size=512 is less than the tokenizer's"):
        train(experiment, tmp_path / "run")
