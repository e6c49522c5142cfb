"""The launcher: it says where it is, drains at SIGTERM, and ends with status 0."""

import json
import signal
import subprocess
import sys
import time

import httpx2
import jax
import pytest
from running import ROOT, environment

from glm_jax.config import glm_config
from glm_jax.model import params as glm_params
from glm_jax.model.checkpoint import save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("models") / "small"
    config = glm_config("tiny", vocab_size=4096, max_sequence_length=128)
    config = config.replace(special_tokens=tokenizer.special_tokens)
    save_model(folder, config, glm_params.init(config, jax.random.key(0)), tokenizer.files)
    return folder


def _start(*flags, devices=1):
    return subprocess.Popen(
        [sys.executable, "-m", "launch.serve", "--port=0", *flags],
        cwd=ROOT,
        env=environment(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait_ready(url):
    deadline = time.monotonic() + 120
    while True:
        assert time.monotonic() < deadline
        if httpx2.get(url + "/ready").status_code == 200:
            return
        time.sleep(0.1)


@pytest.mark.parametrize("mesh", [None, "1,1,2"])
def test_it_serves_and_drains(folder, mesh):
    flags = [f"--checkpoint={folder}", "--quantization=int4", "--slots=2", "--max_length=64"]
    flags.append("--prefill_width=64")  # fewer programs to compile
    flags += [] if mesh is None else [f"--mesh={mesh}"]
    process = _start(*flags, devices=1 if mesh is None else 2)
    try:
        first = process.stdout.readline()
        assert first.startswith("serving small on http://127.0.0.1:"), first
        url = first.split()[-1]
        _wait_ready(url)
        asked = {"model": "small", "prompt": "The capital of", "max_tokens": 50, "seed": 1}
        whole = httpx2.post(url + "/v1/completions", json=asked, timeout=60).json()
        with httpx2.stream(
            "POST", url + "/v1/completions", json=asked | {"stream": True}, timeout=60
        ) as response:
            lines = response.iter_lines()
            told = [next(lines)]
            process.send_signal(signal.SIGTERM)
            told += lines
        events = [line[6:] for line in told if line]
        assert events[-1] == "[DONE]"
        text = "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])
        assert text == whole["choices"][0]["text"]
        assert process.wait(60) == 0
        assert process.stderr.read() == ""
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        ([], 2, "checkpoint"),
        (["--checkpoint=nowhere"], 1, "--checkpoint=nowhere: there is no such folder"),
        (["--checkpoint={folder}", "--mesh=1,1,3"], 1, "mesh"),
        (["--checkpoint={folder}", "--max_length=999"], 1, "past the model's 128 positions"),
        (["--checkpoint={folder}", "--api_keys=none"], 1, "--api_keys=none: "),
        (["--checkpoint={folder}", "--port=70000"], 2, "port"),
        (["--checkpoint={folder}", "--host=no.such.invalid"], 1, "--host=no.such.invalid"),
    ],
)
def test_what_cannot_be_served(folder, flags, status, message):
    process = _start(*(flag.format(folder=folder) for flag in flags))
    _, complaint = process.communicate(timeout=120)
    assert process.returncode == status
    [line] = complaint.splitlines()
    assert line.startswith("error: ")
    assert message in line
