"""A server in a thread, of a small model with random weights."""

import asyncio
import contextlib
import socket
import threading
import time

import httpx2
import jax
from drawn_adapters import drawn

from glm_jax.config import glm_config
from glm_jax.engine.engine import Engine, EngineSettings
from glm_jax.model import params as glm_params
from glm_jax.model.adapters import attach_several
from glm_jax.model.device_layout import prepare
from glm_jax.serving.server import Server, bound_socket
from glm_jax.serving.service import Serving
from glm_jax.serving.worker import ServedModel

NAME = "tiny"
POSITIONS = 128
SETTINGS = EngineSettings(slots=4, page_size=16, prefill_width=64, prefill_budget=64)


# With a seed: by chance an end token would come before the tests' ends.
ASKED = {
    "model": NAME,
    "prompt": "The capital of",
    "temperature": 1.0,
    "max_tokens": 100,
    "seed": 1,
}


def post(served, path="/v1/completions", **more):
    return httpx2.post(served.url + path, **({"json": ASKED, "timeout": 60} | more))


def error_of(response, status):
    assert response.status_code == status
    [error] = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    return error


def tiny_served(tokenizer, settings=SETTINGS, adapters=()):
    """A model with the tokenizer's vocabulary, and adapters drawn at random."""
    config = glm_config("tiny", vocab_size=4096, max_sequence_length=POSITIONS)
    config = config.replace(special_tokens=tokenizer.special_tokens)
    params = glm_params.init(config, jax.random.key(0))
    several = [(x, drawn(config, x, seed=seed)) for seed, x in enumerate(adapters)]
    params = prepare(attach_several(params, several, "float32"))
    return ServedModel(Engine(params, config, settings), params, config, tokenizer)


class Served:
    """What runs.

    Attributes:
      url: of the server.
      service: its parts.
      loop: its event loop.
    """

    def __init__(self, load, send_buffer=None, followers=None, **serving):
        self._listening = bound_socket("127.0.0.1", 0)
        if send_buffer is not None:
            self._listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self.error = None
        self._arguments = load, Serving(NAME, **serving), followers
        self._is_there = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        self._is_there.wait()
        self.service = self.server.service

    async def _run(self):
        self.server = Server(*self._arguments)
        self.loop = asyncio.get_running_loop()
        self._is_there.set()
        try:
            await self.server.run(self._listening)
        except Exception as error:
            self.error = error

    def wait_ready(self):
        while httpx2.get(self.url + "/ready").status_code != 200:
            time.sleep(0.05)

    @property
    def connections(self):
        return list(self.server.connections)

    def drain(self):
        self.loop.call_soon_threadsafe(self.server.drain)

    def join(self):
        self._thread.join(60)
        assert not self._thread.is_alive()
        self._listening.close()


@contextlib.contextmanager
def running(load, **serving):
    served = Served(load, **serving)
    try:
        served.wait_ready()
        yield served
    finally:
        served.drain()
        served.join()


def metrics_of(served):
    """Values of `/metrics`, as texts."""
    text = httpx2.get(served.url + "/metrics").text
    return dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))


def wait_idle(served):
    """Until no answer is being made."""
    engine = served.service.worker.model.engine
    deadline = time.monotonic() + 60
    while not engine.is_idle or served.service.worker.open_sessions:
        assert time.monotonic() < deadline, "slots are still taken"
        time.sleep(0.01)


def list_of(item, size):
    """JSON of so many characters."""
    return "[" + ",".join([item] * (size // (len(item) + 1))) + "]"


async def max_lag(until):
    """The longest time for which the event loop did nothing else."""
    most = 0.0
    while not until.is_set():
        before = time.perf_counter()
        await asyncio.sleep(0.005)
        most = max(most, time.perf_counter() - before)
    return most
