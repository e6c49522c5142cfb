"""A batch job killed at random moments answers every prompt once, as one that was not."""

import json
import random
import sys
import time

import jax
import numpy as np
import pytest
from forked import Try, run_all
from running import Started, environment

from glm_jax.checkpoints.model_folder import save_model
from glm_jax.config import glm_config
from glm_jax.model import params as glm_params

PROMPTS = 500


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("model") / "model"
    config = glm_config("tiny", num_heads=8, vocab_size=-(-tokenizer.vocab_size // 64) * 64)
    save_model(folder, config, glm_params.init(config, jax.random.key(0)), tokenizer.files)
    return folder


def _start(model, source, output, count, number):
    return Started(
        [
            sys.executable,
            "-m",
            "launch.decode",
            f"--checkpoint={model}",
            f"--input={source}",
            f"--output={output}",
            "--max_length=96",
            "--temperature=1",
            f"--num_processes={count}",
            f"--process_id={number}",
        ],
        environment(1),
    )


def _merged(output):
    merge = Try(("launch.decode", f"--output={output}", "--merge"), str(output))
    [(status, _, said)] = run_all([merge], environment(1))
    assert status == 0, said
    return [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]


def _written(output):
    return sum(part.read_bytes().count(b"\n") for part in output.glob("part_*"))


def test_killed_at_random_every_prompt_is_answered_once(model, corpus, tmp_path):
    source = tmp_path / "in.jsonl"
    rng = np.random.default_rng(0)
    with source.open("w", encoding="utf-8") as file:
        for number in range(PROMPTS):
            text = corpus.questions[number % len(corpus.questions)].text
            request = {"id": f"q{number}", "text": text, "max_tokens": int(rng.integers(1, 40))}
            file.write("broken\n" if number % 97 == 5 else json.dumps(request) + "\n")
    _start(model, source, tmp_path / "whole", 1, 0).finish()
    expected = _merged(tmp_path / "whole")
    assert [record["index"] for record in expected] == list(range(PROMPTS))
    assert sum("error" in record for record in expected) == 6

    output, draw = tmp_path / "killed", random.Random(0)
    reached = []
    for counts in (1, 3, 2):
        started = [_start(model, source, output, counts, number) for number in range(counts)]
        goal = _written(output) + draw.randint(20, 120)
        while any(process.is_running() for process in started) and _written(output) < goal:
            time.sleep(0.002)
        for process in started:
            process.kill()
        reached.append(_written(output))
    print(f"answers when it was killed: {reached} of {PROMPTS}", flush=True)
    assert reached == sorted(set(reached))
    assert reached[-1] < PROMPTS
    for process in [_start(model, source, output, 2, number) for number in range(2)]:
        process.finish()
    assert _written(output) == PROMPTS
    assert _merged(output) == expected
