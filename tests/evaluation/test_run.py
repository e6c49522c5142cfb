"""Scoring in packs and on meshes, and evaluations that stop and go on."""

import dataclasses
import errno
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from running import ROOT
from stub_tokenizer import WordTokenizer

from glm_jax.engine.scoring import Scorer, ScoringError
from glm_jax.engine.scoring_batch import make_batches
from glm_jax.errors import UserError
from glm_jax.evaluation import reports
from glm_jax.evaluation.examples import Example
from glm_jax.evaluation.results import ResultsError, read_results
from glm_jax.evaluation.run import data_files, evaluate, with_data
from glm_jax.evaluation.sequences import choice_sequence
from glm_jax.evaluation.task_config import TaskConfig, TaskError, find_tasks, load_task
from glm_jax.evaluation.tasks import Model, MultipleChoice
from glm_jax.generation.scored_texts import continuation
from glm_jax.jobs.batch_job import Share
from glm_jax.jobs.record_store import AnswerWriter, JobError
from glm_jax.model import params as glm_params
from glm_jax.model.device_layout import prepare
from glm_jax.quantization import Scheme
from glm_jax.sharding import make_mesh

RNG = np.random.default_rng(0)
ALONE = Share(0, 1, None)


def _sequences(count, low, high, special):
    lengths = RNG.integers(low, high, count)
    make = lambda n: RNG.integers(3, 490, n).tolist()
    return [continuation(make(n - n // 3), make(n // 3), special) for n in lengths]


def _scores(scorer, sequences):
    found = {s.number: s.log_probabilities for s in scorer.score(sequences)}
    return [found[i] for i in range(len(sequences))]


def test_packs_hold_every_sequence_once_and_little_padding(golden_special):
    sequences = _sequences(500, 32, 512, golden_special)
    seen, run, filled = [], 0, 0
    for batch in make_batches(sequences, 512, 8):
        run, filled = run + batch.tokens.size, filled + batch.filled
        for number, row, first, end in batch.slices:
            seen.append(number)
            sequence = sequences[number]
            places = batch.indices[row, first:end]
            start = places[0] - sequence.indices[0]
            held = batch.tokens[row, start : start + len(sequence)]
            np.testing.assert_array_equal(held, sequence.tokens)
            np.testing.assert_array_equal(batch.targets[row, first:end], sequence.targets)
    assert sorted(seen) == list(range(500))
    assert filled == sum(map(len, sequences))
    assert 1 - filled / run < 0.10


def test_more_may_be_asked_than_there_are_tokens(golden_float32, golden_special):
    """Of many choices of one token each, all at one place."""
    config, params = golden_float32
    task = TaskConfig("t", "mul", ".", max_seq_length=64)
    choices = tuple((token,) for token in range(10, 60))
    examples = [Example((i,), choices, 0) for i in range(100, 130)]
    sequences = [choice_sequence(e, task, golden_special, True) for e in examples]
    scores = _scores(Scorer(params, config, 128), sequences)
    assert all(len(values) == 50 for values in scores)
    [alone] = _scores(Scorer(params, config), sequences[:1])
    np.testing.assert_allclose(scores[0], alone, atol=2e-5)


def test_packed_equals_alone(golden_float32, golden_special):
    config, params = golden_float32
    sequences = _sequences(40, 6, 60, golden_special)
    together = _scores(Scorer(params, config), sequences)
    for sequence, values in zip(sequences[:6], together, strict=False):
        [alone] = _scores(Scorer(params, config, 64), [sequence])
        np.testing.assert_allclose(values, alone, atol=2e-5)


@pytest.mark.parametrize("shape", [(2, 2, 2), (8, 1, 1), (1, 1, 8)])
def test_a_mesh_gives_the_same(golden_float32, golden_special, shape):
    config, params = golden_float32
    sequences = _sequences(30, 6, 60, golden_special)
    mesh = make_mesh(shape)
    shardings = jax.tree.map(lambda a: a.sharding, glm_params.abstract(config, mesh))
    sharded = jax.device_put(params, shardings)
    got = _scores(Scorer(sharded, config), sequences)
    for values, expected in zip(got, _scores(Scorer(params, config), sequences), strict=True):
        np.testing.assert_allclose(values, expected, atol=5e-5)


def test_prepared_int4_equals_int4(golden_float32, golden_special):
    config, params = golden_float32
    sequences = _sequences(10, 6, 60, golden_special)
    quantized = glm_params.quantize_params(params, Scheme(4, search=False))
    expected = _scores(Scorer(quantized, config), sequences)
    for values, same in zip(
        _scores(Scorer(prepare(quantized), config), sequences), expected, strict=True
    ):
        np.testing.assert_allclose(values, same, atol=2e-3)


@pytest.fixture
def model(golden_float32, golden_special):
    config, params = golden_float32
    return Model(params, config, WordTokenizer(golden_special))


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    for prompt in ("a", "b"):
        (folder / "task" / prompt).mkdir(parents=True)
        lines = [
            {
                "inputs": RNG.integers(3, 490, int(n)).tolist(),
                "choices": RNG.integers(3, 490, (3, 2)).tolist(),
                "label": int(n) % 3,
            }
            for n in RNG.integers(4, 40, 17)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "task" / prompt / "test.jsonl").write_text(text)
    return folder


TASK = TaskConfig("task", "mul", "task", file_pattern=(("test", "**/test.jsonl"),))


def _asked(monkeypatch):
    """Numbers of the examples that are asked."""
    asked = []
    answer = MultipleChoice.answer
    watched = lambda self, examples, wanted: asked.extend(wanted) or answer(self, examples, wanted)
    monkeypatch.setattr(MultipleChoice, "answer", watched)
    return asked


def test_only_what_is_missing_is_asked(tmp_path, model, data, monkeypatch):
    run = lambda: evaluate([TASK], data, tmp_path / "out", model, ALONE, {"checkpoint": "x"})
    asked = _asked(monkeypatch)
    whole = run()
    assert sorted(asked) == sorted(2 * list(range(17)))
    [first, _] = data_files(TASK, data, tmp_path / "out")
    [part] = first.records.glob("part_*.jsonl")
    lines = part.read_bytes().splitlines(keepends=True)
    # Killed while the sixth record was being written.
    part.write_bytes(b"".join(lines[:5]) + lines[5][:20])
    kept = {json.loads(line)["index"] for line in lines[:5]}
    asked.clear()
    again = run()
    assert sorted(asked) == sorted(set(range(17)) - kept)
    assert again == whole
    asked.clear()
    assert run() == whole
    assert asked == []


def test_a_model_without_finite_numbers_is_an_error_and_leaves_no_record(tmp_path, model, data):
    damaged = dataclasses.replace(
        model.params.final_layernorm, bias=np.full(64, np.nan, np.float32)
    )
    params = dataclasses.replace(model.params, final_layernorm=damaged)
    broken = Model(params, model.config, model.tokenizer)
    with pytest.raises(ScoringError, match="not finite"):
        evaluate([TASK], data, tmp_path / "out", broken, ALONE, {"checkpoint": "x"})
    assert not [p for p in (tmp_path / "out").rglob("part_*") if p.read_bytes()]
    with pytest.raises(JobError, match="answer 3 is no JSON"):
        AnswerWriter(tmp_path, 0).write({"index": 3, "log_probabilities": [float("nan")]})


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"tasks": 1}', b'{"tasks": {"a": 1}}', b"[" * 100_000, b"\xff\xfe{\0",
     b'{"tasks": {"a": {"groups": {"b": {"files": {"c": {"metrics": {}, "units": 3}}}}}}}',
     b'{"tasks": {"a": {"groups": {"b": {"files": {"c": {"metrics": {"m": {"value": "x"}}}}}}}}}'],
)  # fmt: skip
def test_what_is_no_results_file_is_named(tmp_path, content):
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(ResultsError, match=r"results\.json"):
        read_results(tmp_path / "results.json")
    with pytest.raises(UserError, match=r"results\.json"):
        reports.read_published(tmp_path / "results.json")


def test_records_of_something_else_are_refused(tmp_path, model, data):
    run = lambda task, who: evaluate([task], data, tmp_path / "out", model, ALONE, {"model": who})
    run(TASK, "a")
    with pytest.raises(JobError, match="model was 'a' and is 'b'"):
        run(TASK, "b")
    with pytest.raises(JobError, match="use_task_mask"):
        run(
            TaskConfig("task", "mul", "task", use_task_mask=True, file_pattern=TASK.file_pattern),
            "a",
        )


def test_processes_share_examples_and_the_last_has_the_results(tmp_path, model, data):
    run = lambda share: evaluate([TASK], data, tmp_path / "out", model, share, {})
    assert run(Share(0, 2, None)) is None
    shared = run(Share(1, 2, None))
    alone = evaluate([TASK], data, tmp_path / "alone", model, ALONE, {})
    assert shared == alone
    # One that was killed leaves its share to whoever comes next.
    assert evaluate([TASK], data, tmp_path / "next", model, Share(2, 3, None), {}) is None
    assert evaluate([TASK], data, tmp_path / "next", model, ALONE, {}) == alone


def test_a_data_folder_that_cannot_be_read_is_called_that(tmp_path, monkeypatch):
    """Also where it is one of several, whose files would be left out."""
    (tmp_path / "task" / "below").mkdir(parents=True)
    (tmp_path / "task" / "a.jsonl").write_text("{}\n")
    (tmp_path / "file").write_text("x")
    task = TaskConfig("task", "mul", "task")
    with pytest.raises(TaskError, match=r"nowhere.task: No such file or directory"):
        task.files(tmp_path / "nowhere")
    with pytest.raises(TaskError, match=r"file.task: Not a directory"):
        task.files(tmp_path / "file")
    real = os.scandir

    def scandir(path):
        if Path(path).name == "below":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(TaskError, match=r"below: Permission denied"):
        task.files(tmp_path)


def test_a_group_without_files_is_named(tmp_path, model, data, capsys):
    task = TaskConfig("task", "mul", "task", file_pattern=(("dev", "**/dev.jsonl"),))
    with pytest.raises(TaskError, match="no file is"):
        evaluate([task], data, tmp_path / "out", model, ALONE, {})
    patterns = (*TASK.file_pattern, *task.file_pattern)
    task = TaskConfig("task", "mul", "task", file_pattern=patterns)
    results = evaluate([task], data, tmp_path / "out", model, ALONE, {})
    assert list(results["tasks"]["task"]["groups"]) == ["test"]
    assert "task task: group dev has no file" in capsys.readouterr().err


def test_published_numbers_are_of_our_tasks_and_precisions():
    tasks = {load_task(path).name for path in find_tasks([ROOT / "configs" / "tasks"])}
    path = ROOT / "configs" / "published.yaml"
    published = reports.read_published(path)
    assert set(published) <= tasks
    assert published["LAMBADA"] == {"Accuracy": 80.2}
    assert published["MMLU"] == {"Accuracy": 44.8}
    assert len(published["Pile"]) == 19
    assert reports.read_published(path, "int4")["LAMBADA"] == {"Accuracy": 79.47}
    assert reports.read_published(path, "int4")["C3"] == published["C3"]


def test_reports(tmp_path, model, data):
    results = evaluate([TASK], data, tmp_path / "out", model, ALONE, {"checkpoint": "m"})
    published = {"task": {"Accuracy": 44.8}}
    table = reports.text_table(results, published)
    average = results["tasks"]["task"]["groups"]["test"]["summary"]["Accuracy"]["average"]
    assert f"{average:.3f}" in table
    assert table.splitlines()[1].endswith("44.8")
    assert "| task | test | Accuracy | 34 |" in reports.markdown(results, published)
    reports.draw(results, published, tmp_path / "results.png")
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_tasks_without_data_are_all_named_and_left_out_by_flag(data, capsys):
    others = [TaskConfig(name, "gen", name) for name in ("x", "y")]
    with pytest.raises(TaskError, match=r"2 of 3 tasks have no data in .*: x, y .*--skip_missing"):
        with_data([TASK, *others], data, skips_others=False)
    assert with_data([TASK, *others], data, skips_others=True) == [TASK]
    assert "2 of 3 tasks have no data in" in capsys.readouterr().err
    assert with_data([TASK], data, skips_others=True) == [TASK]
    assert capsys.readouterr().err == ""
    with pytest.raises(TaskError, match="2 of 2 tasks have no data"):
        with_data(others, data, skips_others=True)
    with pytest.raises(TaskError, match="task x: "):
        with_data(others[:1], data, skips_others=False)


def test_a_task_file_gives_the_task_that_wrote_it(tmp_path):
    task = dataclasses.replace(TASK, max_seq_length=64, metrics=("Accuracy", "F1_binary"))
    (tmp_path / "task.yaml").write_text(task.to_yaml(), encoding="utf-8")
    assert load_task(tmp_path / "task.yaml") == task
