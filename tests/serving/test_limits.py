"""What a server refuses and what it gives up."""

import asyncio
import concurrent.futures
import json
import socket
import threading
import time

import httpx2
import pytest
from served import (
    ASKED,
    NAME,
    Served,
    error_of,
    list_of,
    max_lag,
    metrics_of,
    post,
    running,
    wait_idle,
)

from glm_jax.engine.speculation import DraftCounts
from glm_jax.errors import UserError
from glm_jax.serving.connections import ConnectionLimits
from glm_jax.serving.keys import Keys, KeysError
from glm_jax.serving.service import Limits

pytest_plugins = ["serving_fixtures"]


@pytest.mark.parametrize("slow_steps", [0.25], indirect=True)  # longer than a busy machine takes
@pytest.mark.parametrize("stream", [True, False])
def test_one_who_goes_away_frees_the_slot_within_a_step(model, slow_steps, stream):
    with running(lambda: model) as served:
        address = served.url.removeprefix("http://").split(":")
        content = json.dumps(ASKED | {"stream": stream}).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n"
        )
        with socket.create_connection((address[0], int(address[1]))) as connection:
            connection.sendall(head.encode() + content)
            while not model.engine.running:
                time.sleep(0.001)
            time.sleep(0.12)
            assert model.engine.running == 1
        gone = time.monotonic()
        while model.engine.running:
            assert time.monotonic() < gone + 5
            time.sleep(0.001)
        # The step that was on its way, and that before which the word came.
        assert sum(at > gone for at in slow_steps) <= 1
        wait_idle(served)


def test_time_is_limited(model, slow_steps):
    with running(lambda: model, limits=Limits(seconds=1.0)) as served:
        error = error_of(post(served), 504)
        assert error["code"] == "timeout"
        assert "within 1 seconds" in error["message"]
        with httpx2.stream(
            "POST", served.url + "/v1/completions", json=ASKED | {"stream": True}, timeout=60
        ) as response:
            lines = [line[6:] for line in response.iter_lines() if line]
        assert "[DONE]" not in lines
        assert json.loads(lines[-1])["error"]["code"] == "timeout"
        wait_idle(served)


def test_keys(model, tmp_path):
    file = tmp_path / "keys"
    file.write_text("# who may\nkey-one\n\n  key-two \n")
    with running(lambda: model, keys=Keys.read(str(file))) as served:
        asked = {"json": ASKED | {"max_tokens": 1}}
        for key, status in ((None, 401), ("key", 401), ("key-one", 200), ("key-two", 200)):
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            response = post(served, headers=headers, **asked)
            assert response.status_code == status
            if status == 401:
                assert error_of(response, 401)["code"] == "invalid_api_key"
        assert post(served, headers={"Authorization": "Basic key-one"}, **asked).status_code == 401
        assert httpx2.get(served.url + "/v1/models").status_code == 401
        assert post(served, "/tokenize", json={"text": "a"}).status_code == 401
        for path in ("/", "/page/page.js", "/health", "/ready", "/metrics", "/openapi.json"):
            assert httpx2.get(served.url + path).status_code == 200, path
    (tmp_path / "none").write_text("# nothing\n")
    with pytest.raises(KeysError, match="no key in it"):
        Keys.read(str(tmp_path / "none"))
    with pytest.raises(UserError, match="No such file"):
        Keys.read(str(tmp_path / "missing"))


def test_sizes_are_limited(model):
    with running(lambda: model, limits=Limits(body_bytes=2000)) as served:
        large = json.dumps(ASKED | {"prompt": "a" * 2000}).encode()
        headers = {"Content-Type": "application/json"}
        error = error_of(post(served, json=None, content=large, headers=headers), 413)
        assert "over 2000 bytes" in error["message"]
        pieces = lambda: iter([large[:1000], large[1000:]])  # of no length that is said before
        error_of(post(served, json=None, content=pieces(), headers=headers), 413)
        assert post(served).status_code == 200


def test_bodies_that_are_no_requests(model):
    with running(lambda: model) as served:
        headers = {"Content-Type": "application/json"}
        for content in (
            b"",
            b"{",
            b"[]",
            b"\xff",
            b'{"a":' * 5000,
            b'{"max_tokens": 1' + b"0" * 5000 + b"}",
        ):
            error_of(post(served, json=None, content=content, headers=headers), 400)
        # What a browser lets any page send.
        for kind in ("text/plain", "text/plain; x=json", "multipart/form-data; boundary=json"):
            sent = json.dumps(ASKED).encode()
            plain = post(served, json=None, content=sent, headers={"Content-Type": kind})
            assert "application/json" in error_of(plain, 400)["message"]
        nan = b'{"model": "tiny", "prompt": "a", "temperature": NaN}'
        error_of(post(served, json=None, content=nan, headers=headers), 400)
        surrogate = b'{"model": "tiny", "prompt": "\\ud800"}'
        error_of(post(served, json=None, content=surrogate, headers=headers), 400)
        assert error_of(httpx2.get(served.url + "/v1/nothing"), 404)["message"].endswith(
            "/v1/nothing"
        )
        error_of(httpx2.get(served.url + "/v1/completions"), 405)


def test_other_pages_may_ask_only_where_they_are_named(model):
    origin = "https://example.org"
    ask = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    with running(lambda: model) as served:
        response = httpx2.options(served.url + "/v1/fill", headers=ask)
        assert "access-control-allow-origin" not in response.headers
    with running(lambda: model, cors_origins=[origin]) as served:
        response = httpx2.options(served.url + "/v1/fill", headers=ask)
        assert response.headers["access-control-allow-origin"] == origin
        other = httpx2.options(
            served.url + "/v1/fill", headers=ask | {"Origin": "https://other.org"}
        )
        assert "access-control-allow-origin" not in other.headers


def test_metrics(model, monkeypatch):
    monkeypatch.setattr(model.engine._speculation, "counts", DraftCounts(12, 9))
    with running(lambda: model) as served:
        for _ in range(3):
            answered = post(served, json=ASKED | {"max_tokens": 5}).json()
        post(served, json={})
        wait_idle(served)
        found = metrics_of(served)
    assert float(found["glm_generated_tokens_total"]) == 15
    assert float(found["glm_draft_tokens_total"]) == 12
    assert float(found["glm_accepted_draft_tokens_total"]) == 9
    prompt = answered["usage"]["prompt_tokens"]
    assert float(found["glm_prompt_tokens_total"]) == 3 * prompt
    completions = 'endpoint="/v1/completions"'
    assert float(found[f'glm_requests_total{{{completions},status="200"}}']) == 3
    assert float(found[f'glm_requests_total{{{completions},status="400"}}']) == 1
    assert float(found[f"glm_request_seconds_count{{{completions}}}"]) == 4
    assert float(found["glm_time_to_first_token_seconds_count"]) == 3
    assert float(found["glm_time_per_output_token_seconds_count"]) == 3
    assert float(found["glm_slots"]) == model.engine.slots
    assert float(found["glm_slots_running"]) == float(found["glm_queue_length"]) == 0
    assert 0 < float(found["glm_tokens_per_second"]) <= 1.5  # of ten seconds


def test_a_search_that_fails_harms_no_other(model, monkeypatch):
    def broken(*args):
        yield
        raise RuntimeError("out of memory")

    monkeypatch.setattr("glm_jax.serving.completions.filling_by_beams", broken)
    with running(lambda: model) as served:
        asked = {"model": NAME, "prompt": "a", "num_beams": 2, "max_tokens": 2}
        error_of(post(served, json=asked), 500)
        assert post(served).status_code == 200


def test_a_search_compiles_while_others_go_on(model, monkeypatch):
    may_compile = threading.Event()

    def search(*args):
        yield may_compile.wait
        yield None
        assert may_compile.is_set()
        raise UserError("the end")

    monkeypatch.setattr("glm_jax.serving.completions.filling_by_beams", search)
    asked = {"model": NAME, "prompt": "a", "num_beams": 2}
    with running(lambda: model) as served, concurrent.futures.ThreadPoolExecutor(2) as pool:
        searching = [pool.submit(post, served, json=asked) for _ in range(2)]
        try:
            for _ in range(2):
                assert post(served, json=ASKED | {"max_tokens": 3}).status_code == 200
            assert not any(search.done() for search in searching)
        finally:
            may_compile.set()
        for search in searching:
            assert error_of(search.result(), 400)["message"] == "the end"


def _ask_and_read_nothing(served, **more):
    """A client whose answers fill what little room there is on their way."""
    host, port = served.url.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect((host, int(port)))
    content = json.dumps(ASKED | {"stream": True, "logprobs": 5} | more).encode()
    head = f"Host: localhost\r\nContent-Length: {len(content)}\r\n"
    head = f"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\n{head}\r\n"
    connection.sendall(head.encode() + content)
    return connection


@pytest.mark.parametrize("stall_seconds", [0.2, 60.0])
def test_who_reads_nothing_takes_no_room(model, stall_seconds):
    limits = ConnectionLimits(stall_seconds=stall_seconds)
    served = Served(lambda: model, max_waiting=0, connections=limits, send_buffer=4096)
    try:
        served.wait_ready()
        with _ask_and_read_nothing(served, n=model.engine.slots):
            worker = served.service.worker
            for is_there in (lambda: worker.running, lambda: not worker.running):
                while not is_there():
                    time.sleep(0.001)
            whole = {"n": model.engine.slots, "max_tokens": 2}
            assert post(served, json=ASKED | whole).status_code == 200
            if stall_seconds < 1:
                wait_idle(served)
            else:
                assert worker.open_sessions == 1
    finally:
        served.drain()
        served.join()


def test_large_bodies_stop_no_one(model):
    bodies = {
        "objects": list_of("{}", 300_000),
        "texts": list_of('"a"', 900_000),
        "tokens": list_of("1", 300_000),
        "token lists": list_of("[1]", 600_000),
        "a word": f'"{"a" * 900_000}"',
    }
    over = asyncio.Event()
    headers = {"Content-Type": "application/json"}
    with running(lambda: model) as served:
        lag = asyncio.run_coroutine_threadsafe(max_lag(over), served.loop)
        for name, prompt in bodies.items():
            content = f'{{"model": "{NAME}", "prompt": {prompt}}}'.encode()
            refused = post(served, json=None, content=content, headers=headers)
            assert len(error_of(refused, 400)["message"]) < 300, name
        served.loop.call_soon_threadsafe(over.set)
        assert lag.result() < 1  # it was up to 13


def test_prompts_are_counted_before_they_are_read(model, monkeypatch):
    def encode(tokenizer, text):
        raise AssertionError("a prompt was read")

    with running(lambda: model) as served:
        monkeypatch.setattr(type(model.tokenizer), "encode", encode)
        most = served.service.worker.max_answers
        too_many = post(served, json=ASKED | {"prompt": ["a"] * (most + 1)})
        assert f"{most + 1} answers: at most {most}" in error_of(too_many, 400)["message"]
        long = {"prompt": ["a"] * 200, "suffix": "b" * 9000}
        assert (
            "suffix: 1800000 characters"
            in error_of(post(served, json=ASKED | long), 400)["message"]
        )
