"""Evaluations by two processes, and killed at random moments, equal one that ran alone."""

import json
import random
import sys
import time

import numpy as np
import pytest
from evaluation_folder import write_evaluation
from running import Started, environment, free_port

EXAMPLES = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer, corpus):
    return write_evaluation(tmp_path_factory.mktemp("evaluation"), tokenizer, corpus, EXAMPLES)


def _start(folder, output, devices, *more):
    command = [sys.executable, "-m", "launch.evaluate", f"--checkpoint={folder}/model"]
    command += [f"--task={folder}/tasks", f"--data={folder}/data", f"--output={output}", *more]
    return Started(command, environment(devices))


def _results(output):
    return json.loads((output / "results.json").read_text())["tasks"]


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("alone") / "out"
    _start(folder, output, 1).finish()
    return _results(output)


def _assert_close(results, expected):
    for task, of_task in expected.items():
        assert results[task]["examples"] == of_task["examples"] == 2 * EXAMPLES
        for metric, numbers in of_task["summary"].items():
            got = results[task]["summary"][metric]["average"]
            assert got == pytest.approx(numbers["average"], rel=1e-3), (task, metric)


@pytest.mark.parametrize(
    ("mesh", "is_joined"),
    [("1,1,8", True), ("2,1,4", False)],
    ids=["one model", "a model each"],
)
def test_two_processes_of_four_devices(folder, expected, tmp_path, mesh, is_joined):
    """Over gloo where they run one model together."""
    joined = [f"--coordinator=127.0.0.1:{free_port()}"] if is_joined else []
    given = (f"--mesh={mesh}", "--num_processes=2", *joined)
    started = [
        _start(folder, tmp_path / "out", 4, *given, f"--process_id={number}") for number in range(2)
    ]
    for process in started:
        process.finish()
    _assert_close(_results(tmp_path / "out"), expected)


def test_killed_at_random_every_example_counts_once(folder, expected, tmp_path):
    chance = random.Random(0)
    records = tmp_path / "out" / "records"
    written = lambda: sum(p.read_bytes().count(b"\n") for p in records.rglob("part_*"))
    killed_at = []
    while len(killed_at) < 3:
        before, wanted = written(), chance.randrange(1, 50)
        process = _start(folder, tmp_path / "out", 1)
        while process.process.poll() is None and written() < before + wanted:
            time.sleep(0.005)
        if process.process.poll() is not None:
            break
        process.process.kill()
        process.process.wait()
        killed_at.append(written())
    print("records when it was killed:", killed_at)
    assert killed_at
    assert killed_at == sorted(killed_at)
    _start(folder, tmp_path / "out", 1).finish()
    results = _results(tmp_path / "out")
    _assert_close(results, expected)
    for task, of_task in expected.items():
        for group, of_group in of_task["groups"].items():
            for name, file in of_group["files"].items():
                got = results[task]["groups"][group]["files"][name]["units"]
                for metric, units in file["units"].items():
                    np.testing.assert_allclose(got[metric], units, rtol=1e-3)
