"""How a server begins, and how it ends."""

import concurrent.futures
import json
import threading
import time

import httpx2
import pytest
from served import ASKED, Served, error_of, post, tiny_served

from glm_jax.errors import UserError
from glm_jax.serving.errors import ServerError, UnavailableError
from glm_jax.serving.server import bound_socket

pytest_plugins = ["serving_fixtures"]


def _first_event(lines):
    return json.loads(next(line for line in lines if line)[6:])


def test_a_drained_server_answers_who_is_there(model, slow_steps):
    served = Served(lambda: model)
    served.wait_ready()
    with (
        httpx2.Client(base_url=served.url, timeout=60) as other,
        httpx2.stream(
            "POST", served.url + "/v1/completions", json=ASKED | {"stream": True}, timeout=60
        ) as response,
    ):
        assert other.get("/ready").status_code == 200
        lines = response.iter_lines()
        _first_event(lines)
        served.drain()
        time.sleep(0.3)
        with pytest.raises(httpx2.TransportError):
            post(served)
        rest = [line[6:] for line in lines if line]
    assert rest[-1] == "[DONE]"
    assert json.loads(rest[-2])["choices"][0]["finish_reason"]
    served.join()
    assert served.error is None


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("is_forced", [True, False])
def test_whom_an_end_does_not_wait_for(model, slow_steps, caplog, is_forced, stream):
    """A second signal, or the time being over, ends answers without a trace in the log."""
    served = Served(lambda: model, drain_seconds=60.0 if is_forced else 1.0)
    served.wait_ready()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asking = pool.submit(post, served, json=ASKED | {"n": 32, "stream": stream})
        while not model.engine.running:
            time.sleep(0.001)
        began = time.monotonic()
        served.drain()
        if is_forced:
            served.drain()
        served.join()
        assert time.monotonic() - began < 30
        while served.service.worker.is_alive:
            assert time.monotonic() < began + 60
            time.sleep(0.01)
        assert model.engine.is_idle
        if is_forced or stream:
            with pytest.raises(httpx2.RemoteProtocolError):
                asking.result()
        else:
            assert "is going down" in error_of(asking.result(), 503)["message"]
    assert not [record for record in caplog.records if record.exc_info]


def test_a_model_that_is_not_there_yet(model):
    may_load = threading.Event()

    def load():
        may_load.wait()
        return model

    served = Served(load)
    try:
        assert httpx2.get(served.url + "/health").json() == {"status": "ok"}
        assert "is being loaded" in error_of(httpx2.get(served.url + "/ready"), 503)["message"]
        refused = post(served)
        assert error_of(refused, 503)["code"] == "unavailable"
        assert refused.headers["Retry-After"]
        assert "glm_ready 0.0" in httpx2.get(served.url + "/metrics").text
        may_load.set()
        served.wait_ready()
        assert "glm_ready 1.0" in httpx2.get(served.url + "/metrics").text
    finally:
        may_load.set()
        served.drain()
        served.join()


def test_a_server_that_still_loads_ends_at_once():
    may_end = threading.Event()
    served = Served(may_end.wait)
    served.drain()
    served.join()  # though the model is not there
    assert served.service.worker.is_alive
    may_end.set()
    assert served.error is None


def test_a_model_that_cannot_be_loaded():
    def load():
        raise UserError("no such model")

    served = Served(load)
    served.join()
    assert str(served.error) == "no such model"


def test_an_engine_that_fails(tokenizer, monkeypatch):
    model = tiny_served(tokenizer)
    served = Served(lambda: model)
    served.wait_ready()

    def step(engine):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(type(model.engine), "step", step)
    error = error_of(post(served), 500)
    with pytest.raises(UnavailableError, match="the engine failed"):
        served.service.worker.open(1, 1.0)
    assert "out of memory" not in error["message"]  # for the log, not for clients
    served.join()
    assert str(served.error) == "out of memory"


def test_an_address_that_is_taken():
    with bound_socket("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ServerError, match=f"--port={port}: Address already in use"):
            bound_socket("127.0.0.1", port)
    with pytest.raises(ServerError, match=r"--host=no\.such\.host\.invalid"):
        bound_socket("no.such.host.invalid", 0)
