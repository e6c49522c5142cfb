"""Two local processes, started as the templates for Slurm and Kubernetes start them."""

import json
import sys
import time

import httpx2
import numpy as np
import psutil
import pytest
from evaluation_folder import write_evaluation
from forked import Try, run_all
from running import (
    Started,
    arguments,
    environment,
    free_port,
    in_kubernetes,
    in_slurm,
    losses,
    ready,
)

from convert.model_readers import open_model
from convert.verify import compare
from glm_jax.config import GLMConfig
from launch.suites.convert import make_parts

EXAMPLES = 20
schedulers = pytest.mark.parametrize("start", [in_slurm, in_kubernetes])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus, tokenizer):
    """A folder with a text, and the losses of one process that trains on it."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text("\n".join(corpus.sentences[:300]), encoding="utf-8")
    given = arguments(folder, tokenizer, folder / "one", "1,1,1")
    Started([sys.executable, "-m", "launch.train", *given], environment(1)).finish()
    return folder, losses(folder / "one")


@schedulers
def test_two_processes_train_as_one_does(trained, tmp_path, tokenizer, start):
    folder, expected = trained
    two = arguments(folder, tokenizer, tmp_path / "two", "2,2,2")
    for process in start(tmp_path, "train", two, 4):
        process.finish()
    got = losses(tmp_path / "two")
    assert list(got) == list(expected)
    np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=1e-3)
    assert (tmp_path / "two" / "model" / "config.json").is_file()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer, corpus):
    return write_evaluation(tmp_path_factory.mktemp("evaluation"), tokenizer, corpus, EXAMPLES)


@schedulers
def test_two_processes_decode_and_evaluate(folder, corpus, tmp_path, start):
    source, answers, results = (tmp_path / x for x in ("in.jsonl", "answers", "results"))
    texts = [question.text for question in corpus.questions[:40]]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    model, mesh = f"--checkpoint={folder}/model", "--mesh=2,1,1"
    given = [model, f"--input={source}", f"--output={answers}", "--max_length=48", mesh]
    for process in start(tmp_path, "decode", given, 1):
        process.finish()
    merge = Try(("launch.decode", f"--output={answers}", "--merge"), str(tmp_path))
    [(status, _, said)] = run_all([merge], environment(1))
    assert status == 0, said
    merged = [json.loads(line) for line in (answers / "answers.jsonl").open(encoding="utf-8")]
    assert [record["index"] for record in merged] == list(range(40))
    assert not any("error" in record for record in merged)
    assert len(list(answers.glob("part_*"))) > 1  # both took part

    given = [model, f"--task={folder}/tasks", f"--data={folder}/data", f"--output={results}", mesh]
    (tmp_path / "second").mkdir()
    for process in start(tmp_path / "second", "evaluate", given, 1):
        process.finish()
    tasks = json.loads((results / "results.json").read_text())["tasks"]
    assert {task["examples"] for task in tasks.values()} == {2 * EXAMPLES}


@schedulers
def test_two_processes_serve(folder, tmp_path, start):
    """All are told to end at once, as a scheduler does it."""
    port = free_port()
    given = [f"--checkpoint={folder}/model", "--mesh=1,1,2", "--name=tiny", "--host=127.0.0.1"]
    given += [f"--port={port}", "--slots=2", "--max_length=32", "--prefill_width=32"]
    started = start(tmp_path, "serve", given, 1)
    url = f"http://127.0.0.1:{port}"
    while (status := ready(url)) != 200:
        assert all(process.is_running() for process in started), status
        time.sleep(0.2)
    asked = {"model": "tiny", "prompt": "The capital of", "max_tokens": 5}
    answer = httpx2.post(f"{url}/v1/completions", json=asked, timeout=60).json()
    assert answer["usage"]["completion_tokens"]
    below = psutil.Process().children(recursive=True)
    tasks = {x.pid: x for x in below if x.cmdline()[:3] == [sys.executable, "-m", "launch.serve"]}
    for task in tasks.values():
        if task.ppid() not in tasks:
            task.terminate()
    assert "error" not in "".join(process.finish() for process in started)


@schedulers
def test_two_processes_convert(tmp_path, start):
    shape = GLMConfig(
        num_layers=6, hidden_size=128, inner_hidden_size=256, num_heads=8, vocab_size=4096
    )
    make_parts(tmp_path / "downloads", shape, 2, 1 << 22)
    given = [f"--input={tmp_path}/downloads", f"--output={tmp_path}/model"]
    outputs = [process.finish() for process in start(tmp_path, "convert", given, 1)]
    assert "wrote" in "".join(outputs)
    differences = compare(open_model(tmp_path / "downloads"), open_model(tmp_path / "model"))
    assert all(difference is None for difference in differences)
