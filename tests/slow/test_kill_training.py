"""Runs that are killed at random moments lose nothing: `make test-slow`."""

import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from killing import kill_at_random, last_logged_step, logged_lines
from running import Started, arguments, environment, free_port

KILLS = 20
STEPS = {1: 600, 2: 100}  # by processes: several seconds of either


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


def _finish(started):
    for process in started:
        process.finish()


@pytest.mark.parametrize("count", [1, 2])
def test_twenty_kills_at_random_moments_change_no_bit(text, tokenizer, count, capsys):
    _finish(_start(text, tokenizer, text / "whole", count))
    start = lambda: _start(text, tokenizer, text / "killed", count)
    log = kill_at_random(start, text / "killed", STEPS[count], KILLS, seed=count)
    _finish(_start(text, tokenizer, text / "killed", count))
    with capsys.disabled():
        print(f"\n{count} process(es):", *log, sep="\n  ")
    expected, got = logged_lines(text / "whole"), logged_lines(text / "killed")
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
        assert logged_lines(workdir)[-1]["step"] == 60
    finally:
        subprocess.run(["umount", str(workdir)], check=True)


def test_memory_stays_flat_over_a_long_run(text, tokenizer):
    """Resident memory around step 900 is what it was around step 450, to a tenth.

    Each is the least of a hundred steps: a checkpoint being written is no leak.
    """
    [started] = _start(text, tokenizer, text / "run", 1, 950)
    sizes = {}
    while started.is_running():
        step = last_logged_step(text / "run")
        pages = int(Path(f"/proc/{started.process.pid}/statm").read_text().split()[1])
        for at in (450, 900):
            if abs(step - at) <= 50 and pages:  # none of a process that has just ended
                size = pages * resource.getpagesize()
                sizes[at] = min(size, sizes.get(at, size))
        time.sleep(0.05)
    started.finish()
    assert sizes[900] < 1.1 * sizes[450], sizes
