"""Runs that are killed at random moments lose nothing: `make test-slow`."""

import json
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running import Started, arguments, environment, free_port

KILLS = 20
STEPS = {1: 600, 2: 200}  # by processes: several seconds of either


@pytest.fixture
def text(tmp_path, corpus):
    (tmp_path / "text.txt").write_text("\n".join(corpus.sentences[:300]), encoding="utf-8")
    return tmp_path


def _start(folder, tokenizer, workdir, count, steps=None):
    mesh = "1,1,1" if count == 1 else "2,2,2"
    command = [
        sys.executable, "-m", "launch.train",
        *arguments(folder, tokenizer, workdir, mesh, f"--config.steps={steps or STEPS[count]}"),
    ]  # fmt: skip
    variables = environment(8 // count if count > 1 else 1)
    if count == 1:
        return [Started(command, variables)]
    port = free_port()
    several = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}"]
    return [Started([*command, *several, f"--process_id={i}"], variables) for i in range(count)]


def _lines(workdir):
    try:
        text = (workdir / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def _last_step(workdir):
    """By the end of the file alone: this is asked many times a second."""
    try:
        with (workdir / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 2000))
            lines = [line for line in file.read().splitlines() if line.endswith(b"}")]
    except FileNotFoundError:
        return 0
    return json.loads(lines[-1])["step"] if lines else 0


def _finish(started):
    for process in started:
        process.finish()


def _until(moment, started, workdir):
    """Waits for a time since the start, or for a step to be logged, and a little more."""
    kind, value, more = moment
    began = time.monotonic()
    while all(process.is_running() for process in started):
        if kind == "seconds" and time.monotonic() - began >= value:
            return
        if kind == "step" and _last_step(workdir) >= value:
            time.sleep(more)
            return
        assert time.monotonic() - began < 600, "no progress"
        time.sleep(0.02)


@pytest.mark.parametrize("count", [1, 2])
def test_twenty_kills_at_random_moments_change_no_bit(text, tokenizer, count, capsys):
    _finish(_start(text, tokenizer, text / "whole", count))
    rng = random.Random(count)
    steps = sorted(rng.sample(range(1, round(0.8 * STEPS[count])), KILLS - 5))
    moments = [("step", step, rng.uniform(0, 0.3)) for step in steps]
    for _ in range(5):  # while it starts, restores or compiles
        moments.insert(rng.randrange(len(moments)), ("seconds", rng.uniform(1, 8), 0))
    log = []
    for number, moment in enumerate(moments, 1):
        started = _start(text, tokenizer, text / "killed", count)
        _until(moment, started, text / "killed")
        assert all(process.is_running() for process in started), "it ended before the kill"
        for process in started:
            process.kill()
        log.append(
            f"kill {number}: {moment[0]} {moment[1]:.1f}, at step {_last_step(text / 'killed')}"
        )
    _finish(_start(text, tokenizer, text / "killed", count))
    with capsys.disabled():
        print(f"\n{count} process(es):", *log, sep="\n  ")
    expected, got = _lines(text / "whole"), _lines(text / "killed")
    assert [line["step"] for line in got] == list(range(1, STEPS[count] + 1))
    for name in ("loss", "gradient_norm", "update_norm", "activation_scale", "learning_rate"):
        assert [line[name] for line in got] == [line[name] for line in expected], name


def test_without_room_the_last_checkpoint_stays(text, tokenizer):
    """On a file system of 12 MB, which a fourth checkpoint does not fit into."""
    workdir = text / "small"
    workdir.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(workdir)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False).returncode:
        pytest.skip("no file system can be mounted here (that takes root)")
    try:
        more = ["--config.checkpoints_kept=20", "--config.model.hidden_size=64"]
        command = [sys.executable, "-m", "launch.train"]
        command += arguments(text, tokenizer, workdir, "1,1,1", *more, "--config.steps=60")
        output = Started(command, environment(1)).finish(status=1)
        last = output.strip().splitlines()[-1]
        assert last.startswith("error: no room for "), output[-2000:]
        assert "the last whole checkpoint is step 15;" in last
        assert "Traceback" not in output
        assert {f.name for f in (workdir / "checkpoints").iterdir()} == {"5", "10", "15"}
        # With room the same command goes on from there.
        room = ["mount", "-o", "remount,size=400m", str(workdir)]
        subprocess.run(room, check=True)
        assert "the model is in" in Started(command, environment(1)).finish()
        assert _lines(workdir)[-1]["step"] == 60
    finally:
        subprocess.run(["umount", str(workdir)], check=True)


def test_memory_stays_flat_over_a_long_run(text, tokenizer):
    """Resident memory after 900 steps is what it was after 450, to a tenth."""
    [started] = _start(text, tokenizer, text / "run", 1, 950)
    sizes = {}
    while started.is_running():
        step = _last_step(text / "run")
        for at in (450, 900):
            if step >= at and at not in sizes:
                pages = int(Path(f"/proc/{started.process.pid}/statm").read_text().split()[1])
                sizes[at] = pages * resource.getpagesize()
        time.sleep(0.05)
    started.finish()
    assert sizes[900] < 1.1 * sizes[450], sizes
