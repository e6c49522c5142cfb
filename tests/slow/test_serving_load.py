"""Two hundred clients at once, many of whom go away in the middle."""

import asyncio
import json
import random
import signal
from pathlib import Path

import httpx2
from running import ServerProcess, save_tiny

from glm_jax.engine.engine import Engine, EngineSettings
from glm_jax.engine.request import Request
from glm_jax.engine.sampling import Sampling
from glm_jax.generation.blank_filling import PartlyFilled
from glm_jax.generation.driver import complete_all

CLIENTS, WAVES = 200, 5
SLOTS = 16
PROMPTS = ("The capital of France is", "日本的首都是", "The [MASK] of Poland", "a [gMASK]")
_GROWTH = 8 << 20  # bytes: an answer that were kept of each wave takes more


def _asked(number):
    return {
        "prompt": PROMPTS[number % len(PROMPTS)],
        "seed": number,
        "max_tokens": 8 + number % 17,
        "temperature": 1.0,
        "top_k": 100,
        "stream": number % 3 > 0,
    }


def _expected(config, params, tokenizer):
    """Each request's answer by the engine alone."""
    requests = []
    befores = []
    for number in range(CLIENTS):
        asked = _asked(number)
        partly = PartlyFilled.begin(tokenizer, asked["prompt"], 128)
        sampling = Sampling(temperature=1.0, top_k=100)
        requests.append(Request(partly.prompt(), sampling, asked["max_tokens"], number))
        befores.append(partly.tokens[: partly.position])
    texts = [""] * CLIENTS
    for answer in complete_all(Engine(params, config, EngineSettings(SLOTS)), requests):
        before = befores[answer.request_id]
        kept = tokenizer.special_tokens.without_end(answer.tokens)
        whole = tokenizer.decode([*before, *kept])
        texts[answer.request_id] = whole.removeprefix(tokenizer.decode(before))
    return texts


async def _ask(client, number, expected, leaves):
    """One client, who may leave before the end; what does come is its own answer."""
    asked = _asked(number) | {"model": "small"}
    pause = random.Random(number).uniform(0.0, 2.0)
    if not asked["stream"]:
        try:
            response = await client.post(
                "/v1/completions", json=asked, timeout=pause if leaves else 300
            )
        except httpx2.TimeoutException:
            assert leaves
            return
        assert response.json()["choices"][0]["text"] == expected
        return
    text = ""
    async with client.stream("POST", "/v1/completions", json=asked, timeout=300) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line in ("", "data: [DONE]"):
                continue
            text += json.loads(line[6:])["choices"][0]["text"]
            assert expected.startswith(text)
            if leaves and random.Random(number).random() < 0.3:
                return
    if not leaves:
        assert text == expected


def _figures(url):
    lines = httpx2.get(url + "/metrics").text.splitlines()
    return dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))


def _resident(process):
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def test_many_clients_who_come_and_go(tmp_path, tokenizer):
    config, params = save_tiny(tmp_path / "small", tokenizer)
    expected = _expected(config, params, tokenizer)
    assert len(set(expected)) > 150  # so that one could be told from another
    server = ServerProcess(
        f"--checkpoint={tmp_path}/small", f"--slots={SLOTS}", f"--max_waiting={CLIENTS}"
    )
    resident = []
    try:
        server.wait_ready()

        async def wave(number):
            limits = httpx2.Limits(max_connections=None)
            async with httpx2.AsyncClient(base_url=server.url, limits=limits) as client:
                leaving = random.Random(number)
                await asyncio.gather(
                    *(_ask(client, i, expected[i], leaving.random() < 0.5) for i in range(CLIENTS))
                )

        for number in range(WAVES):
            asyncio.run(wave(number))
            while float(_figures(server.url)["glm_slots_running"]):
                pass
            assert float(_figures(server.url)["glm_queue_length"]) == 0
            resident.append(_resident(server.process))
        print("MiB after each wave:", [size >> 20 for size in resident])
        told = [k for k in _figures(server.url) if 'glm_requests_total{endpoint="/v1/comp' in k]
        statuses = {name.split('status="')[1].split('"')[0] for name in told}
        assert {"200", "499"} <= statuses <= {"200", "499", "0"}  # those who left have no other
        assert max(resident[3:]) - resident[2] < _GROWTH
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
    finally:
        server.process.kill()
