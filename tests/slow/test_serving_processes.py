"""A model that several processes serve together: answers, the end, and a process that is killed."""

import concurrent.futures
import json
import signal
import time

import httpx2
import pytest
from running import free_port, ready, save_tiny, start_joined

DEVICES = 4
FLAGS = ["--mesh=2,1,2", "--slots=4", "--max_length=64", "--prefill_width=64", "--name=tiny"]
TEXT = "The capital of"
SAMPLED = {"model": "tiny", "prompt": TEXT, "temperature": 1.0, "max_tokens": 40, "seed": 1}
# What is asked for at once: every kind of answer, and what is refused.
ASKED = [
    ("completions", SAMPLED | {"n": 3, "logprobs": 2}),
    ("completions", SAMPLED | {"prompt": [f"{TEXT} [MASK] is", "A river"], "stop": ["a"]}),
    ("completions", SAMPLED | {"best_of": 3}),
    ("completions", SAMPLED | {"seed": None, "temperature": 0, "num_beams": 2}),
    ("completions", SAMPLED | {"echo": True, "logprobs": 1, "max_tokens": 3}),
    ("completions", SAMPLED | {"prompt": TEXT * 50}),
    ("completions", SAMPLED | {"temperature": -1}),
    ("fill", {"text": f"{TEXT} [MASK] is [MASK].", "temperature": 1, "seed": 2, "max_tokens": 9}),
    ("fill", {"text": f"{TEXT} [MASK] is [MASK].", "num_beams": 2, "max_tokens": 5}),
    ("score", {"context": f"{TEXT} France is [MASK].", "choices": ["Paris", "Rome", "a river"]}),
    ("score", {"context": f"{TEXT} France is [MASK].", "choices": [""]}),
    ("embeddings", {"model": "tiny", "input": [TEXT, "A river"]}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder, tokenizer)
    return folder


class Together:
    """Processes that serve a model, when they are ready."""

    def __init__(self, folder, count):
        port = free_port()
        command = ["launch.serve", f"--checkpoint={folder}", f"--port={port}", *FLAGS]
        self.processes = start_joined(command, count, DEVICES)
        self.url = f"http://127.0.0.1:{port}"
        while ready(self.url) != 200:
            assert all(process.is_running() for process in self.processes)
            time.sleep(0.1)

    def answer(self, kind, asked):
        response = httpx2.post(f"{self.url}/v1/{kind}", json=asked, timeout=120)
        return response.status_code, {
            name: value for name, value in response.json().items() if name not in ("id", "created")
        }

    def answers(self):
        with concurrent.futures.ThreadPoolExecutor(len(ASKED)) as pool:
            return list(pool.map(lambda each: self.answer(*each), ASKED))

    def kill(self):
        for process in self.processes:
            process.kill()


@pytest.fixture
def start(folder):
    started = []

    def make(count):
        started.append(Together(folder, count))
        return started[-1]

    yield make
    for each in started:
        each.kill()


@pytest.fixture(scope="module")
def expected(folder):
    alone = Together(folder, 1)
    answers = alone.answers()
    alone.processes[0].process.terminate()
    alone.processes[0].finish()
    return answers


def _stream(together, **more):
    asked = SAMPLED | {"max_tokens": 45, "stream": True, **more}
    return httpx2.stream("POST", f"{together.url}/v1/completions", json=asked, timeout=120)


def _events(lines):
    return [line[6:] for line in lines if line]


@pytest.mark.parametrize(("count", "told"), [(2, 0), (4, 3)])
def test_as_one_process_and_drained(start, expected, count, told):
    """Whichever process is told to end, the others do so too, after the answers."""
    together = start(count)
    _assert_answers(together, expected)
    with _stream(together) as response:
        lines = response.iter_lines()
        first = next(lines)
        together.processes[told].process.send_signal(signal.SIGTERM)
        events = _events([first, *lines])
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["choices"][0]["finish_reason"]
    for process in together.processes:
        assert "error" not in process.finish(0)


def _assert_answers(together, expected):
    """Also after a client who goes away."""
    with _stream(together) as gone:
        next(gone.iter_lines())
    answers = together.answers()
    assert [status for status, _ in answers] == [status for status, _ in expected]
    for (_, got), (_, wanted) in zip(answers, expected, strict=True):
        _assert_alike(got, wanted)


def _assert_alike(got, wanted):
    """Equal but for the last digits of numbers."""
    assert type(got) is type(wanted)
    if isinstance(wanted, dict):
        assert list(got) == list(wanted)
        got, wanted = list(got.values()), list(wanted.values())
    if isinstance(wanted, list):
        assert len(got) == len(wanted)
        for pair in zip(got, wanted, strict=True):
            _assert_alike(*pair)
    elif isinstance(wanted, float):
        assert got == pytest.approx(wanted, abs=1e-4)
    else:
        assert got == wanted


@pytest.mark.parametrize(
    ("count", "victim", "is_busy"), [(4, 3, True), (2, 1, False), (2, 0, True)]
)
def test_a_lost_process_ends_the_others(start, expected, count, victim, is_busy):
    together = start(count)
    if count == 4:
        _assert_answers(together, expected)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        if is_busy:
            asked = SAMPLED | {"n": 16, "max_tokens": 45}
            pool.submit(httpx2.post, f"{together.url}/v1/completions", json=asked, timeout=60)
            time.sleep(0.5)
        together.processes[victim].kill()
        killed, states = time.monotonic(), []
        while any(process.is_running() for process in together.processes):
            states.append(ready(together.url))
            time.sleep(0.01)
        assert time.monotonic() - killed < 8
    for number, process in enumerate(together.processes):
        if number != victim:
            last = process.finish(1).splitlines()[-1]
            assert last.startswith("error: process "), last
            # Of process 0 the runtime, which aborts, may know before the connection closes.
            known = [
                f"process {victim} of {count} is gone",
                f"no sign of life from process {victim}",
            ]
            assert any(words in last for words in known), last
    # Ready, then not, then gone.
    assert states == sorted(states, key=(200, 503, None).index)
