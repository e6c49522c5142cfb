"""Training runs that are killed at random moments."""

import json
import random
import time


def logged_lines(workdir):
    try:
        text = (workdir / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def last_logged_step(workdir):
    """By the end of the file alone: this is asked many times a second."""
    try:
        with (workdir / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 2000))
            lines = [line for line in file.read().splitlines() if line.endswith(b"}")]
    except FileNotFoundError:
        return 0
    return json.loads(lines[-1])["step"] if lines else 0


def _until(moment, started, workdir):
    """Waits for a time since the start, or for a step to be logged, and a little more."""
    kind, value, more = moment
    began = time.monotonic()
    while all(process.is_running() for process in started):
        if kind == "seconds" and time.monotonic() - began >= value:
            return
        if kind == "step" and last_logged_step(workdir) >= value:
            time.sleep(more)
            return
        assert time.monotonic() - began < 600, "no progress"
        time.sleep(0.02)


def kill_at_random(start, workdir, steps, kills, seed):
    """Starts a run again and again, each time to kill it: a third of the times in its first
    seconds, while it starts, restores or compiles, else after steps that chance names.

    Returns:
      A line for each kill.
    """
    rng = random.Random(seed)
    early = kills // 3
    reached = sorted(rng.sample(range(1, round(0.8 * steps)), kills - early))
    moments = [("step", step, rng.uniform(0, 0.3)) for step in reached]
    for _ in range(early):  # while so many steps are left that the run does not end before
        place = rng.randrange(len(moments) // 2)
        moments.insert(place, ("seconds", rng.uniform(0.5, 4), 0))
    log = []
    for number, moment in enumerate(moments, 1):
        started = start()
        _until(moment, started, workdir)
        assert all(process.is_running() for process in started), "it ended before the kill"
        for process in started:
            process.kill()
        log.append(
            f"kill {number}: {moment[0]} {moment[1]:.1f}, at step {last_logged_step(workdir)}"
        )
    return log
