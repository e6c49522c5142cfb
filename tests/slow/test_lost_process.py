"""A process that is killed ends the others by a line, and nothing is lost: `make test-slow`.

Training runs as two processes and loses the first, goes on as four and loses the last, and is
finished by one; so do evaluation, which loses the first of two, and a batch job, which loses the
last. Processes that only share work end when they have done their own.
"""

import json
import random
import sys
import time

import numpy as np
import pytest
from evaluation_folder import write_evaluation
from forked import Try, run_all
from running import Started, arguments, environment, losses, start_joined

from convert.model_readers import open_model
from convert.verify import compare
from glm_jax.config import GLMConfig
from launch.suites.convert import make_parts

HEARTBEAT = 10  # seconds
STEPS, EXAMPLES, PROMPTS = 40, 40, 200


def _lose(started, victim, is_far):
    """Kills one process when the job has come far enough; the others end as they should."""
    began = time.monotonic()
    while not is_far():
        assert all(process.is_running() for process in started), [
            process.finish(1)[-1500:] for process in started if not process.is_running()
        ]
        assert time.monotonic() - began < 600, "no progress"
        time.sleep(0.01)
    started[victim].kill()
    killed = time.monotonic()
    for process in started[:victim] + started[victim + 1 :]:
        last = process.finish(1).splitlines()[-1]
        assert last.startswith("error: "), last
        assert "another process is gone" in last
    # What they do in the meantime, on two cores, comes on top.
    assert time.monotonic() - killed < HEARTBEAT + 20


def _lines(pattern, folder):
    return sum(path.read_bytes().count(b"\n") for path in folder.glob(pattern))


def test_training(tmp_path, tokenizer, corpus):
    (tmp_path / "text.txt").write_text("\n".join(corpus.sentences[:300]), encoding="utf-8")

    def command(name, mesh):
        exact = ("--config.optimizer.dropout=0.0", "--config.optimizer.attention_dropout=0.0")
        more = (*exact, f"--config.steps={STEPS}")
        return ["launch.train", *arguments(tmp_path, tokenizer, tmp_path / name, mesh, *more)]

    [whole] = start_joined(command("whole", "1,1,1"), 1, 1)
    whole.finish()
    metrics = lambda: _lines("metrics.jsonl", tmp_path / "lost")
    _lose(start_joined(command("lost", "2,2,2"), 2), 0, lambda: metrics() >= 8)
    _lose(start_joined(command("lost", "2,1,4"), 4), 3, lambda: metrics() >= 22)
    [rest] = start_joined(command("lost", "1,1,1"), 1, 1)
    rest.finish()
    expected, got = losses(tmp_path / "whole"), losses(tmp_path / "lost")
    assert list(got) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=2e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer, corpus):
    return write_evaluation(tmp_path_factory.mktemp("evaluation"), tokenizer, corpus, EXAMPLES)


def test_evaluating(folder, tmp_path):
    def command(name, mesh):
        data = [f"--task={folder}/tasks", f"--data={folder}/data", f"--output={tmp_path / name}"]
        return ["launch.evaluate", f"--checkpoint={folder}/model", *data, f"--mesh={mesh}"]

    [whole] = start_joined(command("whole", "1,1,1"), 1, 1)
    whole.finish()
    records = lambda: _lines("records/**/part_*", tmp_path / "lost")
    _lose(start_joined(command("lost", "1,1,8"), 2), 0, lambda: records() >= 1)
    [rest] = start_joined(command("lost", "1,1,1"), 1, 1)
    rest.finish()
    results = lambda name: json.loads((tmp_path / name / "results.json").read_text())["tasks"]
    for task, expected in results("whole").items():
        assert results("lost")[task]["examples"] == expected["examples"] == 2 * EXAMPLES
        for metric, numbers in expected["summary"].items():
            got = results("lost")[task]["summary"][metric]["average"]
            assert got == pytest.approx(numbers["average"], rel=1e-3), (task, metric)


def test_decoding(folder, corpus, tmp_path):
    source, draw = tmp_path / "in.jsonl", random.Random(0)
    with source.open("w", encoding="utf-8") as file:
        for number in range(PROMPTS):
            text = corpus.questions[number % len(corpus.questions)].text
            file.write(json.dumps({"text": text, "max_tokens": draw.randint(1, 20)}) + "\n")

    def command(name, mesh):
        files = [f"--input={source}", f"--output={tmp_path / name}", "--max_length=64"]
        return ["launch.decode", f"--checkpoint={folder}/model", *files, f"--mesh={mesh}"]

    def answers(name):
        merge = Try(("launch.decode", f"--output={tmp_path / name}", "--merge"), str(tmp_path))
        [(status, _, said)] = run_all([merge], environment(1))
        assert status == 0, said
        return (tmp_path / name / "answers.jsonl").read_text().splitlines()

    [whole] = start_joined(command("whole", "1,1,1"), 1, 1)
    whole.finish()
    written = lambda: _lines("part_*", tmp_path / "lost")
    _lose(start_joined(command("lost", "1,1,8"), 2), 1, lambda: written() >= 20)
    assert written() < PROMPTS
    [rest] = start_joined(command("lost", "1,1,1"), 1, 1)
    rest.finish()
    assert len(answers("whole")) == PROMPTS
    assert answers("lost") == answers("whole")


def test_converting(tmp_path):
    """Here processes share work alone: those that are left do theirs."""
    shape = GLMConfig(
        num_layers=40, hidden_size=128, inner_hidden_size=256, num_heads=8, vocab_size=16384
    )
    make_parts(tmp_path / "downloads", shape, 2, 1 << 22)

    def start(name, count):
        command = [sys.executable, "-m", "convert.sat_to_orbax", f"--num_processes={count}"]
        command += [f"--input={tmp_path / 'downloads'}", f"--output={tmp_path / name}"]
        return [Started([*command, f"--process_id={i}"], environment(1)) for i in range(count)]

    start("whole", 1)[0].finish()
    parts = tmp_path / "lost.partial" / "params"
    count = lambda: len([p for p in parts.glob("layers*") if "tmp" not in p.name])
    for processes, victim in ((2, 1), (4, 3)):  # whose share is in the other's
        before, started = count(), start("lost", processes)
        while count() < before + 2:
            assert started[victim].is_running(), started[victim].finish(1)
            time.sleep(0.001)
        started[victim].kill()
        for process in started[:victim] + started[victim + 1 :]:
            process.finish()
        assert not (tmp_path / "lost").exists()
    start("lost", 1)[0].finish()
    models = [open_model(tmp_path / name) for name in ("lost", "whole")]
    assert all(difference is None for difference in compare(*models))
