"""Training learns, goes on where it stopped, and refuses what cannot be."""

import itertools
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from running import StopError, broken_at

from configs import glm_130b
from glm_jax import restore
from glm_jax.config import ConfigError
from glm_jax.data.tokenize_files import prepare
from glm_jax.errors import UserError
from glm_jax.model import params as glm_params
from glm_jax.sharding import make_mesh
from glm_jax.tokenizer import Tokenizer
from glm_jax.training import config as train_config
from glm_jax.training import metrics
from glm_jax.training.batches import MeshBatches, open_mixture
from glm_jax.training.config import default_config
from glm_jax.training.loop import DivergedError, train
from glm_jax.training.results import refuse_result_of_others, replace_result
from glm_jax.training.stopping import InterruptedRunError


def test_loss_goes_down_and_the_model_restores(experiment, tmp_path):
    history = train(experiment, tmp_path / "run", profiled=range(6, 8))
    losses = [h["loss"] for h in history]
    assert [h["step"] for h in history] == [4, 8, 12, 16, 20, 24]
    assert losses[-1] < losses[0] - 1
    config, params = restore(tmp_path / "run" / "model")
    assert config.special_tokens is not None
    assert glm_params.parameter_count(config) == sum(x.size for x in jax.tree.leaves(params))
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == history
    assert {"loss_text_span", "loss_text_suffix", "mfu", "tokens_per_second"} <= set(history[0])
    assert len(history[0]["activation_scale"]) == 2
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def _assert_same_losses(got, expected):
    by_step = {line["step"]: line for line in expected}
    for line in got:
        for name in ("loss", "gradient_norm", "update_norm", "activation_scale"):
            assert line[name] == by_step[line["step"]][name], (line["step"], name)


def test_a_resumed_run_equals_an_unbroken_one_to_the_bit(experiment, tmp_path, monkeypatch):
    unbroken = train(experiment, tmp_path / "whole")
    with monkeypatch.context() as patched:
        broken_at(12, patched)
        with pytest.raises(StopError):
            train(experiment, tmp_path / "broken")
    resumed = train(experiment, tmp_path / "broken")
    assert resumed[0]["step"] == 12
    _assert_same_losses(resumed, unbroken)
    whole, broken = (restore(tmp_path / name / "model")[1] for name in ("whole", "broken"))
    jax.tree.map(np.testing.assert_array_equal, whole, broken)
    lines = (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 8, 12, 16, 20, 24]
    # Started once more, a finished run has nothing to do.
    assert train(experiment, tmp_path / "broken") == []


def test_an_attention_that_these_devices_have_not_is_refused_at_the_start(experiment, tmp_path):
    experiment.optimizer.attention = "mosaic"
    with pytest.raises(ConfigError, match=r"optimizer\.attention='mosaic': .* runs on cuda"):
        train(experiment, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_batch_grows_and_is_accumulated(experiment, tmp_path, monkeypatch):
    """The same rows give the same losses, however many of them the devices take at once, and a run
    that stops in the ramp goes on in it."""
    experiment.optimizer.dropout = experiment.optimizer.attention_dropout = 0.0
    experiment.data.update(initial_batch_size=2, ramp_fraction=0.25, streams=2)
    experiment.log_every, experiment.steps, experiment.checkpoint_every = 1, 6, 2
    runs = {}
    for rows in (2, 4):
        experiment.data.micro_batch_size = rows
        history = runs[rows] = train(experiment, tmp_path / f"run{rows}")
        assert len(history) > 6  # small batches make more updates of the same rows
        schedule = train_config.batch_schedule(experiment)
        sizes = [(schedule.accumulation(n), schedule.rows(n)) for n in (0, 2, 4, 6, 100)]
        assert sizes == [(1, 2)] * 3 + [(4 // rows, rows)] * 2
    losses = [[line["loss"] for line in history] for history in runs.values()]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    with monkeypatch.context() as patched:
        broken_at(3, patched)
        with pytest.raises(StopError):
            train(experiment, tmp_path / "broken")
    _assert_same_losses(train(experiment, tmp_path / "broken"), runs[4])


def test_a_micro_batch_of_more_rows_has_the_same_rows(experiment):
    """Whatever its size, each stream gives its next rows."""
    mesh, rows = make_mesh((1, 1, 1)), 4
    tokenizer = Tokenizer(experiment.data.tokenizer)
    open_batches = lambda: MeshBatches(
        open_mixture(experiment.data, experiment, tokenizer, 2), mesh
    )
    small, large = open_batches(), open_batches()
    parts, whole = small.next(2), large.next(1, rows)
    assert whole.tokens.shape[:2] == (1, rows)
    np.testing.assert_array_equal(
        np.swapaxes(parts.tokens, 0, 1).reshape(whole.tokens.shape), whole.tokens
    )
    np.testing.assert_array_equal(small.next(1).tokens, large.next(1).tokens)


def _signalled_at_step(monkeypatch, step, received):
    """Sends this process signals during a step."""
    real = metrics.MetricsLogger.count

    def count(self, rows, tokens):
        real(self, rows, tokens)
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps == step:
            for number in received:
                os.kill(os.getpid(), number)

    monkeypatch.setattr(metrics.MetricsLogger, "count", count)


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(experiment, tmp_path, monkeypatch, capsys):
    unbroken = train(experiment, tmp_path / "whole")
    assert "resuming" not in capsys.readouterr().err
    with monkeypatch.context() as patched:
        _signalled_at_step(patched, 5, [signal.SIGTERM])
        with pytest.raises(InterruptedRunError, match="by SIGTERM after step 5, which is saved"):
            train(experiment, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "5").is_dir()
    _assert_same_losses(train(experiment, tmp_path / "run")[1:], unbroken)
    assert "resuming from step 5, whose checkpoint is in" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_saves_as_sigterm_does_and_a_longer_run_replaces_its_model(
    experiment, tmp_path, monkeypatch, capsys
):
    # A shell has its background processes ignore SIGINT, and a run leaves that as it is.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    experiment.steps, experiment.peak_flops = 4, 1e9
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        _signalled_at_step(patched, 2, [signal.SIGINT])
        with pytest.raises(InterruptedRunError, match="by SIGINT after step 2") as raised:
            train(experiment, run)
    assert raised.value.status == 130
    assert (run / "checkpoints" / "2").is_dir()
    with monkeypatch.context() as patched:
        _signalled_at_step(patched, 1, [signal.SIGINT, signal.SIGINT])
        with pytest.raises(KeyboardInterrupt):
            train(experiment, run)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "resuming from step 2, whose" in capsys.readouterr().err
    train(experiment, run)
    first = restore(run / "model")[1].word_embeddings
    experiment.steps = 6
    with monkeypatch.context() as patched:
        patched.setattr("glm_jax.training.results.save_model", _raise_stop)
        with pytest.raises(StopError):
            train(experiment, run)
    np.testing.assert_array_equal(restore(run / "model")[1].word_embeddings, first)
    assert train(experiment, run) == []
    assert not np.array_equal(first, restore(run / "model")[1].word_embeddings)


def test_a_run_replaces_no_model_that_no_run_wrote(experiment, tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "weights").write_text("another's")
    with pytest.raises(UserError, match=r"run/model is no earlier run's"):
        train(experiment, tmp_path / "run")
    assert (tmp_path / "run" / "model" / "weights").read_text() == "another's"


def test_a_result_behind_a_link_is_replaced_there(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "model").symlink_to("disk/model")
    for step in (1, 2):
        replace_result(tmp_path / "model", step, lambda folder: folder.mkdir(), lambda folder: None)
        refuse_result_of_others(tmp_path / "model")
    assert {path.name for path in (tmp_path / "disk").iterdir()} == {"model", "model.json"}
    assert (tmp_path / "model").is_symlink()


def test_what_a_run_leaves_is_always_of_its_last_step(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    written = []

    def leave(step):
        def write(to):
            to.mkdir()
            (to / "step").write_text(str(step))
            written.append(step)

        replace_result(folder, step, write, lambda folder: None)
        assert {path.name for path in tmp_path.iterdir()} == {"model", "model.json"}

    leave(4)
    leave(4)
    assert written == [4]
    leave(8)
    assert written == [4, 8]
    assert (folder / "step").read_text() == "8"
    # Killed while it is written, or while it takes its place: the same step is written again.
    for killed_at in ("glm_jax.files.replacing", "pathlib.Path.rename"):
        with monkeypatch.context() as patched:
            patched.setattr(killed_at, _raise_stop)
            with pytest.raises(StopError):
                leave(9)
        assert folder.is_dir() or (tmp_path / "model.old").is_dir()
        leave(9)
        leave(8)
    shutil.rmtree(folder)
    leave(8)
    assert (folder / "step").read_text() == "8"


def _raise_stop(*_):
    raise StopError


def _poison(monkeypatch, numbers):
    """Makes the losses of some batches infinite."""
    real, drawn = MeshBatches.next, []

    def poisoned(self, accumulation, rows):
        batch = real(self, accumulation, rows)
        drawn.append(batch)
        if len(drawn) in numbers:
            batch = batch.replace(loss_weights=batch.loss_weights * np.inf)
        return batch

    monkeypatch.setattr(MeshBatches, "next", poisoned)


@pytest.mark.slow
def test_after_bad_steps_the_last_checkpoint_goes_on_with_later_data(
    experiment, tmp_path, monkeypatch, capsys
):
    experiment.stability.restore_after = 3
    experiment.log_every = 1
    with monkeypatch.context() as patched:
        _poison(patched, {12, 13, 14, 17})
        history = train(experiment, tmp_path / "run")
    steps = [h["step"] for h in history if not h["is_skipped"]]
    # Batches 12 to 14 were bad: from step 11 back to the checkpoint of 8. 17 was alone.
    assert steps == [*range(1, 12), *range(9, 25)]
    assert [h["step"] for h in history if h["is_skipped"]] == [11, 11, 11, 10]
    assert "going back to the checkpoint of step 8" in capsys.readouterr().err
    assert all(np.isfinite(h["loss"]) for h in history if not h["is_skipped"])
    with monkeypatch.context() as patched:
        _poison(patched, range(3, 100))
        with pytest.raises(DivergedError, match="before the first checkpoint"):
            train(experiment, tmp_path / "early")
    with monkeypatch.context() as patched:
        _poison(patched, range(10, 1000))
        with pytest.raises(DivergedError, match="after every restore"):
            train(experiment, tmp_path / "late")


@pytest.mark.slow
def test_evaluation_by_kind_and_language_from_a_mixture(experiment, tmp_path, tokenizer, corpus):
    texts = {
        "en": [s for s in corpus.sentences if s.isascii()][:150],
        "zh": [s for s in corpus.sentences if not s.isascii()][:150],
    }
    for language, sentences in texts.items():
        (tmp_path / f"{language}.txt").write_text("\n".join(sentences), encoding="utf-8")
    pairs = [{"prompt": f"double {i}", "target": str(2 * i)} for i in range(40)]
    (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    for name, kind in (("en.txt", "text"), ("zh.txt", "text"), ("tasks.jsonl", "instructions")):
        prepare(
            [tmp_path / name], tmp_path / "data" / name.split(".")[0], tokenizer, kind=kind,
            language=name.split(".")[0], window=40, processes=1, max_bad_lines=0,
        )  # fmt: skip
    mixture = ",".join(
        f"{tmp_path}/data/{name}:{weight}"
        for name, weight in (("en", 0.5), ("zh", 0.3), ("tasks", 0.2))
    )
    experiment.data.update(files="", mixture=mixture)
    experiment.evaluation.update(mixture=mixture, every=12, batches=4)
    history = train(experiment, tmp_path / "run")
    evaluations = [h for h in history if "evaluation_loss" in h]
    assert [h["step"] for h in evaluations] == [12, 24]
    names = {"en_span", "en_suffix", "zh_span", "zh_suffix", "tasks_instruction"}
    for line in evaluations:
        assert names == {
            k.removeprefix("evaluation_loss_") for k in line if k.startswith("evaluation_loss_")
        }
    assert evaluations[1]["evaluation_loss"] < evaluations[0]["evaluation_loss"]


def test_the_batch_grows_as_the_papers():
    config = default_config("tiny")
    config.steps = 25_000
    config.data.update(batch_size=4224, initial_batch_size=192, micro_batch_size=96)
    schedule = train_config.batch_schedule(config)
    total = config.steps * 4224
    assert [96 * schedule.accumulation(n) for n in (0, total)] == [192, 4224]
    assert 96 * schedule.accumulation(round(0.0125 * total)) == 192 + 10 * 192
    assert 96 * schedule.accumulation(round(0.025 * total)) == 4224
    sizes = [schedule.accumulation(n) for n in range(0, total, 10_000)]
    assert sizes == sorted(sizes)


def test_the_130b_begins_with_the_papers_192_rows():
    """Small batches are taken at once, and none in more parts than its rows need."""
    config = glm_130b.get_config()
    schedule, end = train_config.batch_schedule(config), config.steps * 4224
    assert (schedule.accumulation(0), schedule.rows(0)) == (1, 192)
    assert (schedule.accumulation(end), schedule.rows(end)) == (4, 1056)
    ramp = range(0, round(0.026 * end), 96)
    splits = list(dict.fromkeys((schedule.accumulation(n), schedule.rows(n)) for n in ramp))
    assert len(splits) <= 22  # programs
    sizes = [accumulation * rows for accumulation, rows in splits]
    assert sizes == sorted(set(sizes))
    for (accumulation, rows), size in zip(splits, sizes, strict=True):
        assert rows % 96 == 0
        assert accumulation == -(-size // 1056)
    # No size is far from the paper's line.
    assert max(b - a for a, b in itertools.pairwise(sizes)) <= 2 * 192


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
