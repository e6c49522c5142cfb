"""The launcher: it says where it is, drains at SIGTERM and Ctrl-C, and ends with their status."""

import json
import re
import signal

import httpx2
import pytest
from drawn_adapters import save_drawn
from forked import Try, run_all
from running import ServerProcess, environment, save_tiny

from glm_jax.model.adapters import AdapterConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("models") / "small"
    save_tiny(folder, tokenizer)
    save_drawn(folder.parent / "adapter", folder, AdapterConfig(rank=2))
    return folder


# What each signal ends it with, and what it says on stderr.
ENDS = [(signal.SIGTERM, 0, ""), (signal.SIGINT, 130, "error: interrupted\n")]


@pytest.mark.parametrize(
    ("mesh", "ends"), list(zip([None, "1,1,2"], ENDS, strict=True)), ids=["term", "int"]
)
def test_it_serves_and_drains(folder, mesh, ends):
    number, status, line = ends
    flags = [f"--checkpoint={folder}", "--quantization=int4", "--slots=2", "--max_length=64"]
    flags += ["--prefill_width=64", "--log_requests"]  # fewer programs to compile
    flags.append(f"--adapter=tuned={folder.parent}/adapter")
    flags += [] if mesh is None else [f"--mesh={mesh}"]
    server = ServerProcess(*flags, devices=1 if mesh is None else 2)
    process = server.process
    try:
        server.wait_ready()
        url = server.url
        assert url.startswith("http://127.0.0.1:")
        asked = {"model": "small", "prompt": "The capital of", "max_tokens": 50, "seed": 1}
        whole = httpx2.post(url + "/v1/completions", json=asked, timeout=60).json()
        named = asked | {"model": "tuned"}
        tuned = httpx2.post(url + "/v1/completions", json=named, timeout=60).json()
        assert tuned["model"] == "tuned"
        assert tuned["choices"][0]["text"] != whole["choices"][0]["text"]
        with httpx2.stream(
            "POST", url + "/v1/completions", json=asked | {"stream": True}, timeout=60
        ) as response:
            lines = response.iter_lines()
            sent = [next(lines)]
            process.send_signal(number)
            sent += lines
        events = [line[6:] for line in sent if line]
        assert events[-1] == "[DONE]"
        text = "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])
        assert text == whole["choices"][0]["text"]
        assert process.wait(60) == status
        assert process.stderr.read() == line
        _assert_logged(process.stdout.read())
    finally:
        process.kill()


def _assert_logged(output):
    """Each line has its time; the requests for /ready before it is ready are among them."""
    lines = [line for line in output.splitlines() if not line.startswith("waiting for ")]
    events = [line.split(maxsplit=2)[2] for line in lines]
    others = [event for event in events if not event.startswith("request from 127.0.0.1: GET")]
    expected = [
        "loading the model",
        r"loaded in \d+ s; compiling",
        r"ready: compiled in \d+ s",
        *[r"request from 127.0.0.1: POST '/v1/completions': 200 in \d+\.\d+ s"] * 2,
        "draining: 1 requests are running",
        r"request from 127.0.0.1: POST '/v1/completions': 200 in \d+\.\d+ s",
        "ended",
    ]
    assert len(others) == len(expected), others
    for event, pattern in zip(others, expected, strict=True):
        assert re.fullmatch(pattern, event)


@pytest.mark.parametrize(("number", "status", "line"), ENDS)
def test_it_ends_while_it_loads(folder, number, status, line):
    process = ServerProcess(f"--checkpoint={folder}").process
    process.stdout.readline()
    process.send_signal(number)
    assert process.wait(60) == status
    assert process.stderr.read() == line


REFUSED = [
    ([], 2, "checkpoint"),
    (["--checkpoint=nowhere"], 1, "nowhere holds no model"),
    (["--checkpoint={folder}", "--mesh=1,1,3"], 1, "mesh"),
    (["--checkpoint={folder}", "--max_length=999"], 1, "past the model's 128 positions"),
    (["--checkpoint={folder}", "--api_keys=none"], 1, "--api_keys=none: "),
    (["--checkpoint={folder}", "--port=70000"], 2, "port"),
    (["--checkpoint={folder}", "--adapter=a=x", "--adapter=a=y"], 2, "the name a twice"),
    (["--checkpoint={folder}", "--adapter=x", "--adapter=a=y"], 2, "a name each"),
    (["--checkpoint={folder}", "--adapter=small=x"], 1, "the model's own name, small"),
    (["--checkpoint={folder}", "--adapter=a=nowhere"], 1, "adapter a: nowhere holds no adapters"),
    (["--checkpoint={folder}", "--host=no.such.invalid"], 1, "--host=no.such.invalid"),
]


@pytest.fixture(scope="module")
def refused(folder):
    """What each of `REFUSED` says; all in forks of one process."""
    tries = [
        Try(("launch.serve", "--port=0", *(f.format(folder=folder) for f in flags)), str(folder))
        for flags, _, _ in REFUSED
    ]
    return run_all(tries, environment(1))


@pytest.mark.parametrize("number", range(len(REFUSED)), ids=lambda n: " ".join(REFUSED[n][0]))
def test_what_cannot_be_served(refused, number):
    _, status, message = REFUSED[number]
    ended, _, complaint = refused[number]
    assert ended == status, complaint
    [line] = complaint.splitlines()
    assert line.startswith("error: ")
    assert message in line
