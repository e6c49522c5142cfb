"""Batch jobs from the command line: one process, and two of four devices each."""

import json
import sys

import jax
import pytest
from drawn_adapters import save_drawn
from forked import Try, run_all
from running import Started, environment, free_port

from glm_jax.checkpoints.model_folder import save_model
from glm_jax.config import glm_config
from glm_jax.model import params as glm_params
from glm_jax.model.adapters import AdapterConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("model") / "model"
    config = glm_config("tiny", num_heads=8, vocab_size=-(-tokenizer.vocab_size // 64) * 64)
    save_model(folder, config, glm_params.init(config, jax.random.key(0)), tokenizer.files)
    save_drawn(folder.parent / "adapter", folder, AdapterConfig(rank=2))
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory, corpus):
    path = tmp_path_factory.mktemp("input") / "in.jsonl"
    requests = [
        {
            "text": question.text,
            "max_tokens": 1 + number % 5,
            "temperature": number % 2,
            "log_probabilities": number % 3 == 0,
            **({"adapter": "tuned"} if number % 3 else {}),
        }
        for number, question in enumerate(corpus.questions[:11])
    ]
    lines = [json.dumps(request) for request in requests]
    path.write_text("\n".join([*lines[:4], "broken", *lines[4:]]) + "\n", encoding="utf-8")
    return path


def _command(model, source, output, *more):
    return [
        *("launch.decode", f"--checkpoint={model}", f"--input={source}"),
        *(f"--output={output}", "--max_length=64", "--slots=4", *more),
        f"--adapter=tuned={model.parent}/adapter",
    ]


def _run(folder, *commands):
    """(status, stdout, stderr) of each, in forks of one process."""
    return run_all([Try(tuple(command), str(folder)) for command in commands], environment(1))


def _merge(output):
    return ["launch.decode", f"--output={output}", "--merge"]


def _records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def expected(model, source, tmp_path_factory):
    """What one process answers."""
    folder = tmp_path_factory.mktemp("one")
    output = folder / "out"
    drafts = ("--speculate=3", f"--draft_checkpoint={model}")
    done = _run(
        folder,
        _command(model, source, output),
        _merge(output),
        ["shell", "cp out/answers.jsonl first.jsonl"],
        _command(model, source, output, *drafts),
        _merge(output),
    )
    for status, _, said in done:
        assert status == 0, said[-2000:]
    shown, again = ("".join(done[number][1:]) for number in (0, 3))
    assert "answered by this process: 11, failed: 1;" in shown
    assert "tokens/s" in shown
    assert "12/12" in shown
    records = _records(folder / "first.jsonl")
    assert [record["index"] for record in records] == list(range(12))
    assert [record["id"] for record in records] == list(range(1, 13))
    assert records[4]["line"] == 5
    assert "answered by this process: 0, failed: 0;" in again
    assert "0 of 0 draft tokens accepted" in again
    assert _records(output / "answers.jsonl") == records
    return records


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "is_joined"),
    [("1,1,8", True), ("2,1,4", False)],
    ids=["one model", "a model each"],
)
def test_two_processes_of_four_devices_answer_as_one(
    model, source, expected, tmp_path, mesh, is_joined
):
    """Over gloo where they run one model together."""
    joined = [f"--coordinator=127.0.0.1:{free_port()}"] if is_joined else []
    started = [
        Started(
            [
                *(sys.executable, "-m"),
                *_command(model, source, tmp_path / "out", f"--mesh={mesh}", "--num_processes=2"),
                *(f"--process_id={number}", *joined),
            ],
            environment(4),
        )
        for number in range(2)
    ]
    for process in started:
        process.finish()
    parts = {path.name[:10] for path in (tmp_path / "out").glob("part_*")}
    assert parts == ({"part_00000"} if is_joined else {"part_00000", "part_00001"})
    [(status, _, said)] = _run(tmp_path, _merge(tmp_path / "out"))
    assert status == 0, said[-2000:]
    records = _records(tmp_path / "out" / "answers.jsonl")
    strip = lambda record: {k: v for k, v in record.items() if k != "log_probabilities"}
    assert list(map(strip, records)) == list(map(strip, expected))
    for got, wanted in zip(records, expected, strict=True):
        assert ("log_probabilities" in got) == ("log_probabilities" in wanted)
        for row, other in zip(
            got.get("log_probabilities", []), wanted.get("log_probabilities", []), strict=True
        ):
            assert row == pytest.approx(other, abs=1e-4)


def test_wrong_jobs_are_one_line(model, source, tmp_path):
    given = [f"--checkpoint={model}", f"--input={source}", f"--output={tmp_path}/out"]
    cases = [
        ([f"--output={tmp_path}/out"], 2, "give --checkpoint and --input, or --merge"),
        ([*given, "--slots=0"], 2, "--slots"),
        ([*given, "--embedding_bits=3"], 2, "8 or 4"),
        ([f"--output={tmp_path}/none", "--merge"], 1, "is no job's output"),
        ([*given, f"--input={tmp_path}/none.txt"], 1, "No such file"),
        ([*given, "--num_processes=2"], 1, "2 processes and no coordinator"),
        ([*given, "--num_processes=2", "--process_id=0", "--mesh=1,1,2"], 1, "run one model"),
        ([*given, "--top_p=3"], 2, "top_p=3.0: from 0 to 1"),
    ]
    done = _run(tmp_path, *(["launch.decode", *arguments] for arguments, *_ in cases))
    for (_, status, message), (ended, shown, said) in zip(cases, done, strict=True):
        assert ended == status, said[-2000:]
        [line] = [x for x in (shown + said).splitlines() if "error" in x.lower()]
        assert message in line
    assert not list((tmp_path).glob("out/part_*"))
