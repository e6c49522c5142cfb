"""Command lines as a user types them: what they print, and how they refuse."""

import json
import re
import subprocess
from pathlib import Path

import jax
import pytest
from conftest import GOLDEN
from forked import Try, run_all
from running import environment

from glm_jax.checkpoints.model_folder import save_model
from glm_jax.config import glm_config
from glm_jax.model import params as glm_params
from launch.benchmark import interleaved
from launch.suites.case import Case

ROOT = Path(__file__).parent.parent.parent


def _run(*arguments, cwd=ROOT):
    tried = Try(tuple(map(str, arguments)), str(cwd))
    [(status, shown, said)] = run_all([tried], environment(1))
    return subprocess.CompletedProcess(tried.command, status, shown, said)


def _assert_refused(result, status, *words):
    assert result.returncode == status, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in last


@pytest.mark.slow
def test_from_text_to_filled_blanks(tmp_path, corpus):
    """Tokenizer, training, export, conversion back, INT4 generation: each by its command."""
    (tmp_path / "text.txt").write_text("\n".join(corpus.sentences[:300]), encoding="utf-8")
    result = _run(
        "launch.train_tokenizer",
        f"--input={tmp_path}/text.txt",
        f"--output={tmp_path}/tokenizer",
        "--num_text_tokens=1500",
    )
    assert result.returncode == 0, result.stderr
    train = (
        "launch.train",
        "--config=configs/train_tiny.py",
        f"--workdir={tmp_path}/run",
        f"--config.data.files={tmp_path}/text.txt",
        f"--config.data.tokenizer={tmp_path}/tokenizer",
        "--config.steps=6",
        "--config.model.num_layers=1",
    )
    result = _run(*train)
    assert result.returncode == 0, result.stderr
    assert "step 6, loss " in result.stdout
    assert "training: 0/" in result.stderr
    assert "\r" not in result.stderr
    for line in ("experiment: ", "model: ", "devices: "):
        assert result.stderr.count(f"\n{line}") == 1
    assert "data.batch_size=8" in result.stderr
    model = tmp_path / "run" / "model"
    result = _run(
        "convert.orbax_to_sat", f"--input={model}", f"--output={tmp_path}/sat", "--shards=4"
    )
    assert result.returncode == 0, result.stderr
    convert = (
        "convert.sat_to_orbax",
        f"--input={tmp_path}/sat",
        f"--output={tmp_path}/back",
        "--num_heads=4",
        "--max_sequence_length=128",
        f"--tokenizer={tmp_path}/tokenizer",
    )
    result = _run(*convert)
    assert result.returncode == 0, result.stderr
    assert "from 4 shards" in result.stdout
    _assert_refused(_run(*convert), 1, "is not empty")
    (tmp_path / "prompts.txt").write_text("Paris is in [MASK].\n法国的首都是\n", encoding="utf-8")
    result = _run(
        "launch.generate",
        f"--checkpoint={tmp_path}/back",
        f"--input={tmp_path}/prompts.txt",
        "--dtype=float32",
        "--quantization=int4",
        "--max_length=24",
        "--top_k=3",
        "--temperature=0.8",
        "--guided_choice=Rome",
        "--guided_choice=巴黎",
    )
    assert result.returncode == 0, result.stderr
    assert re.fullmatch("Paris is in (Rome|巴黎).\n法国的首都是 ?(Rome|巴黎)\n", result.stdout)
    _fine_tune(tmp_path)


def _fine_tune(folder):
    """What `folder/back` holds, by paths that are relative to the folder."""
    pairs = (
        {"prompt": "Paris is in [MASK].", "target": "France"},
        {"prompt": "法国", "target": "巴黎"},
    )
    text = "\n".join(json.dumps(pair) for pair in pairs)
    (folder / "pairs.jsonl").write_text(text, encoding="utf-8")
    run = lambda *given: _run(*given, cwd=folder)
    result = run(
        "launch.finetune",
        f"--config={ROOT}/configs/finetune_demo.py",
        "--checkpoint=back",
        "--workdir=tuned",
        "--config.data.files=pairs.jsonl",
        "--config.steps=30",
    )
    assert result.returncode == 0, result.stderr
    assert "the adapters are in tuned/adapter" in result.stdout
    generate = ("launch.generate", "--checkpoint=back", "--input=prompts.txt", "--dtype=float32")
    short = ("--quantization=int4", "--max_length=24")
    adapted = run(*generate, *short, "--adapter=tuned/adapter")
    assert adapted.returncode == 0, adapted.stderr
    assert "Paris is in France." in adapted.stdout
    assert "Paris is in France." not in run(*generate, *short).stdout
    merge = ("convert.merge_adapter", "--input=back", "--adapter=tuned/adapter", "--output=merged")
    assert run(*merge).returncode == 0
    merged = run("launch.generate", "--checkpoint=merged", *generate[2:], "--max_length=24")
    assert "Paris is in France." in merged.stdout
    export = ("convert.orbax_to_sat", "--input=back", "--adapter=tuned/adapter", "--shards=2")
    assert run(*export, "--output=shards").returncode == 0
    verified = run("convert.verify", "merged", "shards", "--num_heads=4")
    assert verified.returncode == 0, verified.stdout
    _assert_refused(run(*generate, "--adapter=back"), 1, "holds no adapters")


def test_the_demo_removes_nothing_but_an_earlier_demo(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    _assert_refused(_run("launch.demo", f"--output={tmp_path}"), 1, "is not empty")
    assert (tmp_path / "mine.txt").read_text() == "keep"


REFUSED = [
    (["launch.generate"], 2, ["--checkpoint"]),
    (["launch.generate", "--checkpoint=x", "--beams=3"], 2, ["beams"]),
    (["launch.generate", "--checkpoint=x", "stray"], 2, ["stray"]),
    (["launch.generate", "--checkpoint=x", "--adapter=a=b"], 2, ["only serve and decode", "a's"]),
    (["launch.generate", "--checkpoint=x", "--quantization=int2"], 2, ["int8 or int4"]),
    (["launch.generate", "--checkpoint=x", "--activation_bits=4"], 2, ["activation_bits"]),
    (["launch.generate", "--checkpoint=x", "--cache_dtype=int4"], 2, ["cache_dtype"]),
    (["launch.generate", "--checkpoint=nowhere", "--tokenizer=no"], 1, ["is missing"]),
    (["launch.generate", "--checkpoint=x", "--input=nowhere.txt"], 1, ["nowhere.txt"]),
    (["launch.generate", "--checkpoint=x", "--temperature=nan"], 2, ["temperature"]),
    (["launch.generate", "--checkpoint=x", "--guided_json=["], 2, ["guided_json", "no JSON"]),
    (["launch.generate", "--checkpoint=x", "--guided_choice="], 2, ["guided_choice", "not empty"]),
    (["launch.train", "--workdir=w", "--config=configs/none.py"], 2, ["none.py"]),
    (
        ["launch.train", "--workdir=w", "--config=configs/train_tiny.py", "--config.stesp=3"],
        2,
        ["stesp"],
    ),
    (["launch.train", "--workdir=w", "--config=configs/train_tiny.py"], 1, ["data.files"]),
    (["launch.train_tokenizer", "--input=no*.txt", "--output=o"], 1, ["no*.txt"]),
    (
        ["convert.sat_to_orbax", "--input=nowhere", "--output=o", "--num_heads=8"],
        1,
        ["nowhere"],
    ),
    (["convert.orbax_to_sat", "--input=nowhere", "--output=o"], 1, ["nowhere"]),
]


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """What each of `REFUSED` says, and its folder; all in forks of one process."""
    folders = [tmp_path_factory.mktemp("refused") for _ in REFUSED]
    tries = [
        Try(tuple(a.replace("configs/", f"{ROOT}/configs/") for a in arguments), str(folder))
        for (arguments, _, _), folder in zip(REFUSED, folders, strict=True)
    ]
    return list(zip(run_all(tries, environment(1)), folders, strict=True))


@pytest.mark.parametrize("number", range(len(REFUSED)), ids=lambda n: " ".join(REFUSED[n][0]))
def test_bad_input_is_one_line_and_a_status(refused, number):
    _, status, words = REFUSED[number]
    (ended, _, complaint), folder = refused[number]
    assert ended == status, complaint
    last = complaint.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "Traceback" not in complaint
    assert all(word in last for word in words)
    assert list(folder.iterdir()) == []


def test_a_checkpoint_without_tokenizer_is_refused(tmp_path):
    _run(
        "convert.sat_to_orbax",
        f"--input={GOLDEN}/checkpoints/tp2",
        f"--output={tmp_path}/model",
        "--num_heads=8",
        "--max_sequence_length=64",
    )
    (tmp_path / "prompts.txt").write_text("one\n")
    result = _run(
        "launch.generate", f"--checkpoint={tmp_path}/model", f"--input={tmp_path}/prompts.txt"
    )
    _assert_refused(result, 1, "tokenizer.model is missing")


def test_generate_in_the_lowest_precisions(tmp_path, tokenizer):
    """Weights in 4 bits, activations, embedding, keys and values in 8: a text comes out."""
    config = glm_config("tiny", vocab_size=-(-tokenizer.vocab_size // 64) * 64)
    params = glm_params.init(config, jax.random.key(0))
    save_model(tmp_path / "model", config, params, tokenizer.files)
    (tmp_path / "prompts.txt").write_text("The capital of France is [MASK].\n")
    result = _run(
        "launch.generate",
        f"--checkpoint={tmp_path}/model",
        f"--input={tmp_path}/prompts.txt",
        "--quantization=int4",
        "--activation_bits=8",
        "--embedding_bits=8",
        "--cache_dtype=int8",
        "--max_length=24",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("The capital of France is")
    assert "[MASK]" not in result.stdout


def test_interleaved_runs_every_case_in_every_round():
    calls = []
    seconds = interleaved({n: Case(lambda n=n: calls.append(n)) for n in "ab"}, 3)
    assert calls == ["a", "a", "b", "b"] * 4
    assert [len(times) for times in seconds.values()] == [3, 3]


def test_every_config_builds_its_model():
    import importlib

    from glm_jax.training.config import batch_schedule, model_config, recipe

    for file in sorted((ROOT / "configs").glob("*.py")):
        if file.stem != "__init__":
            config = importlib.import_module(f"configs.{file.stem}").get_config()
            assert recipe(config).total_samples > 0
            assert batch_schedule(config).accumulation(10**9) > 0
            if not file.stem.startswith("finetune"):  # whose model is its checkpoint's
                assert model_config(config).num_layers > 0
