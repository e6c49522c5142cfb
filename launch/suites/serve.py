"""The server beside its engine alone: tokens a second under load, and what a request costs."""

import asyncio
import contextlib
import dataclasses
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx2
import jax

from glm_jax.config import GLMConfig, SpecialTokens, glm_config
from glm_jax.engine.engine import Engine, EngineSettings
from glm_jax.engine.request import Request
from glm_jax.generation.driver import complete_all
from glm_jax.model import params as glm_params
from glm_jax.model.device_layout import prepare
from glm_jax.model.params import GLMParams
from glm_jax.serving.server import serve
from glm_jax.serving.service import Serving
from glm_jax.serving.worker import ServedModel
from launch.suites.case import Case
from launch.suites.decode import SPECIAL, make_int4, part_of_model, random_prompt
from launch.suites.products import with_integer_activations

CLIENTS, EACH = 16, 3
PROMPT, ANSWER = 128, 64
SETTINGS = EngineSettings(CLIENTS, PROMPT + 1 + ANSWER)
_TIMES, _PAUSE = 50, 0.01
_NAME = "model"


def serve_suite() -> Iterator[tuple[str, dict[str, Case]]]:
    """Clients of one process ask a server in another one."""
    first_tokens: list[float] = []
    requests = [
        Request(random_prompt(part_of_model(), PROMPT, seed), max_tokens=ANSWER, end_tokens=())
        for seed in range(CLIENTS * EACH)
    ]
    with _server("load") as url:
        served = _load("load")
        served.engine.warm_up()
        count = len(requests) * ANSWER
        cases = {
            "engine": Case(lambda: sum(1 for _ in complete_all(served.engine, requests)), count),
            "server": Case(lambda: asyncio.run(_ask_all(url, requests, first_tokens)), count),
        }
        yield (
            f"{CLIENTS} clients at once: a token",
            {name: dataclasses.replace(case, is_long=True) for name, case in cases.items()},
        )
    middle, late = statistics.median(first_tokens), statistics.quantiles(first_tokens, n=20)[-1]
    print(f"time to first token under load: median {1e3 * middle:.0f} ms, 95% {1e3 * late:.0f} ms")
    with _server("small") as url:
        seconds: dict[str, list[float]] = {"engine": [], "server": []}
        yield (
            f"one client: a pause of {1e3 * _PAUSE:.0f} ms and a request",
            _one_request(url, seconds),
        )
    engine, server = (1e3 * statistics.median(times) for times in seconds.values())
    print(f"a request: engine {engine:.2f} ms, server {server:.2f} ms, {server - engine:.2f} more")


def _one_request(url: str, seconds: dict[str, list[float]]) -> dict[str, Case]:
    """Return a request of one token to a model that takes hardly any time.

    Both wait as long before each, for a machine that was idle takes longer to do the same.
    The client is a bare socket: what a client's library takes is not the server's.

    Args:
      seconds: of each request, without the pauses; added to.
    """
    served = _load("small")
    served.engine.warm_up()
    request = Request(random_prompt(served.config, 16), max_tokens=1, end_tokens=())
    where = urlsplit(url)
    connection = socket.create_connection((where.hostname, where.port))
    content = json.dumps(_asked(request, False)).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {where.netloc}\r\n"
        "Content-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )

    def ask() -> None:
        connection.sendall(head.encode() + content)
        answer = connection.recv(65536)
        while not answer.endswith(b"}") and (more := connection.recv(65536)):
            answer += more
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"the server answered {answer[:500]!r}")

    def timed(name: str, run: Callable[[], object]) -> None:
        for _ in range(_TIMES):
            time.sleep(_PAUSE)
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)

    complete = lambda: list(complete_all(served.engine, [request]))
    return {
        "engine": Case(lambda: timed("engine", complete), _TIMES),
        "server": Case(lambda: timed("server", ask), _TIMES),
    }


def _asked(request: Request, stream: bool) -> dict[str, Any]:
    return {
        "model": _NAME,
        "prompt": list(request.prompt.context),
        "max_tokens": request.max_tokens,
        "temperature": 0,
        "stream": stream,
    }


async def _ask_all(url: str, requests: list[Request], first_tokens: list[float]) -> None:
    """Each client sends a request, reads the streamed answer, and sends the next one."""
    async with httpx2.AsyncClient(base_url=url, timeout=600) as client:

        async def ask(some: Iterable[Request]) -> None:
            for request in some:
                began, tokens = time.perf_counter(), 0
                async with client.stream(
                    "POST", "/v1/completions", json=_asked(request, True)
                ) as response:
                    async for line in response.aiter_lines():
                        tokens += line.startswith("data: {")
                        if tokens == 1 and line:
                            first_tokens.append(time.perf_counter() - began)
                assert tokens == ANSWER

        await asyncio.gather(*(ask(requests[i::CLIENTS]) for i in range(CLIENTS)))


class _Numbers:
    """A tokenizer whose tokens are numbers."""

    def __init__(self, special_tokens: SpecialTokens):
        self.special_tokens = special_tokens

    def encode(self, text: str, control_words: tuple[str, ...] = ()) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Iterable[int], /) -> str:
        return "".join(f" {token}" for token in ids)


def _load(kind: str) -> ServedModel:
    config, params = _MODELS[kind]()
    special = config.special_tokens
    assert special is not None
    engine = Engine(params, config, SETTINGS, special)
    return ServedModel(engine, params, config, _Numbers(special))


def _part() -> tuple[GLMConfig, GLMParams]:
    config = part_of_model()
    return config, with_integer_activations(make_int4(config))


def _small() -> tuple[GLMConfig, GLMParams]:
    config = glm_config("tiny", vocab_size=4096, max_sequence_length=PROMPT + 1 + ANSWER)
    config = config.replace(special_tokens=SpecialTokens(*range(SPECIAL)))
    return config, prepare(glm_params.init(config, jax.random.key(0)))


_MODELS: dict[str, Callable[[], tuple[GLMConfig, GLMParams]]] = {"load": _part, "small": _small}


@contextlib.contextmanager
def _server(kind: str) -> Iterator[str]:
    """Start a server in its own process and yield its address."""
    command = [sys.executable, "-m", "launch.suites.serve", kind]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        while httpx2.get(url + "/ready").status_code != 200:
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    serve(lambda: _load(sys.argv[1]), Serving(_NAME, port=0))
