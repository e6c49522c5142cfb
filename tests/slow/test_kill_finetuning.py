"""Fine-tuning that is killed at random moments, or run by several processes."""

import json
import sys

import numpy as np
import pytest
from forked import Try, run_all
from killing import kill_at_random, logged_lines
from running import ROOT, Started, environment, losses, save_tiny, start_joined

STEPS, KILLS = 70, 6


@pytest.fixture
def folder(tmp_path, tokenizer, corpus):
    """A model, and instructions."""
    save_tiny(tmp_path / "model", tokenizer)
    pairs = [{"prompt": b.prompt, "target": b.target} for b in corpus.blanks[:400]]
    lines = [json.dumps(pair, ensure_ascii=False) for pair in pairs]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def _arguments(folder, workdir, mesh, steps, *more):
    return [
        "launch.finetune",
        f"--config={ROOT}/configs/finetune_lora.py",
        f"--checkpoint={folder}/model",
        f"--workdir={workdir}",
        f"--config.data.files={folder}/pairs.jsonl",
        "--config.model.compute_dtype=float32",
        "--config.data.sequence_length=48",
        "--config.data.batch_size=8",
        f"--config.mesh={mesh}",
        f"--config.steps={steps}",
        "--config.log_every=1",
        "--config.checkpoint_every=7",
        *more,
    ]


ALL_OF_IT = (
    "--config.adapter.rank=0",
    "--config.quantization=",
    "--config.optimizer.moments=int8",
    "--config.optimizer.offload_moments",
    "--config.model.param_dtype=bfloat16",
)


@pytest.mark.parametrize("more", [(), ALL_OF_IT], ids=["adapters", "all"])
def test_kills_at_random_moments_change_no_bit(folder, more, capsys):
    def start(workdir):
        command = [sys.executable, "-m", *_arguments(folder, workdir, "1,1,1", STEPS, *more)]
        return [Started(command, environment(1))]

    start(folder / "whole")[0].finish()
    killed = folder / "killed"
    log = kill_at_random(lambda: start(killed), killed, STEPS, KILLS, seed=len(more))
    output = start(killed)[0].finish()
    assert ("the model is in" if more else "the adapters are in") in output
    with capsys.disabled():
        print("\nfine-tuning:", *log, sep="\n  ")
    expected, got = logged_lines(folder / "whole"), logged_lines(killed)
    assert [line["step"] for line in got] == list(range(1, STEPS + 1))
    for name in ("loss", "gradient_norm", "update_norm", "activation_scale"):
        assert [line[name] for line in got] == [line[name] for line in expected], name


@pytest.mark.parametrize("more", [(), ALL_OF_IT], ids=["adapters", "all"])
def test_two_processes_train_as_one(folder, more):
    more = ("--config.adapter.dropout=0.0", *more)
    for count, mesh in ((1, "1,1,1"), (2, "2,2,2")):
        workdir = folder / f"by_{count}"
        command = _arguments(folder, workdir, mesh, 12, *more)
        for process in start_joined(command, count, 1 if count == 1 else 8):
            process.finish()
        left = workdir / ("model" if len(more) > 1 else "adapter")
        assert any(left.iterdir())
    expected, got = (losses(folder / f"by_{count}") for count in (1, 2))
    assert list(got) == list(expected)
    np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=3e-3)


def test_one_line_says_what_is_wrong(folder):
    given = _arguments(folder, folder / "run", "1,1,1", 2)
    cases = {
        "--config.adapter.rank=0": ("error: adapter.rank=0 trains all parameters", 1),
        f"--checkpoint={folder}/nothing": ("holds no model", 1),
        "--config.adapter.ranks=8": ("error: ", 2),
        f"--config.data.files={folder}/*.json": ("no file matches", 1),
    }
    tries = [Try((*given, wrong), str(ROOT)) for wrong in cases]
    done = run_all(tries, environment(1))
    for (line, status), (ended, shown, said) in zip(cases.values(), done, strict=True):
        assert ended == status, said
        assert line in said.strip().splitlines()[-1]
        assert "Traceback" not in shown + said
