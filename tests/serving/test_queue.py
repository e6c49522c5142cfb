"""Who waits for a server's slots, whose turn it is, and who may not wait."""

import concurrent.futures
import time

import pytest
from served import (
    ASKED,
    error_of,
    metrics_of,
    post,
    running,
    wait_idle,
)

from glm_jax.errors import UserError
from glm_jax.serving.keys import Keys

pytest_plugins = ["serving_fixtures"]


def test_a_full_queue_refuses(model, slow_steps):
    with running(lambda: model, max_waiting=2) as served:
        room = model.engine.slots + 2
        with concurrent.futures.ThreadPoolExecutor(room + 4) as pool:
            responses = list(
                pool.map(lambda _: post(served, json=ASKED | {"max_tokens": 40}), range(room + 4))
            )
        refused = [r for r in responses if r.status_code == 429]
        assert len(refused) == 4
        assert sum(r.status_code == 200 for r in responses) == room
        for response in refused:
            assert "2 answers wait already" in error_of(response, 429)["message"]
            assert int(response.headers["Retry-After"]) >= 1
        too_many = post(served, json=ASKED | {"n": room + 1})
        assert f"at most {room} in one request" in error_of(too_many, 400)["message"]
        wait_idle(served)
        assert post(served, json=ASKED | {"n": room, "max_tokens": 2}).status_code == 200


def test_a_queue_full_of_tokens_refuses(model, slow_steps):
    """Also of requests that are few; what runs takes none, and what never fits is said at once."""
    before = model.engine.scheduling.shared_prompts
    slots, long = model.engine.slots, ASKED | {"max_tokens": 60, "n": model.engine.slots}
    with running(lambda: model, max_waiting_tokens=100) as served:
        worker = served.service.worker
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            # More than may wait, but there are slots for them.
            first = pool.submit(post, served, json=long)
            while not (model.engine.running == slots and worker.waiting_tokens == 0):
                time.sleep(0.01)
            waiting = pool.submit(post, served, json=ASKED | {"max_tokens": 30})
            while not worker.waiting_tokens:
                time.sleep(0.01)
            tokens = worker.waiting_tokens
            assert 30 < tokens < 60
            found = metrics_of(served)
            assert float(found["glm_queue_tokens"]) == tokens
            refused = post(served, json=ASKED | {"max_tokens": 70})
            assert f"{tokens} tokens wait already" in error_of(refused, 429)["message"]
            assert int(refused.headers["Retry-After"]) >= 1
            never = post(served, json=ASKED | {"n": slots + 1})
            assert "at most 100 wait in this server" in error_of(never, 400)["message"]
            small = pool.submit(post, served, json=ASKED | {"max_tokens": 2})
            assert {each.result().status_code for each in (first, waiting, small)} == {200}
        wait_idle(served)
        assert worker.waiting_tokens == 0
        shared = model.engine.scheduling.shared_prompts
        assert float(metrics_of(served)["glm_shared_prompts_total"]) == shared
        assert shared - before >= slots - 1


def test_clients_take_turns(model, slow_steps, monkeypatch):
    order = []

    def search(params, config, partly, settings, most):
        order.append(partly.tokens[:2])
        yield None
        raise UserError("the end")

    monkeypatch.setattr("glm_jax.serving.completions.filling_by_beams", search)
    ends = {}

    def ask(served, name, **more):
        post(served, json=ASKED | {"max_tokens": 4} | more)
        ends[name] = time.monotonic()

    searching = {"num_beams": 2, "temperature": None, "seed": None}
    with running(lambda: model) as served, concurrent.futures.ThreadPoolExecutor(4) as pool:
        pool.submit(ask, served, "many", n=32)
        pool.submit(ask, served, "searches", prompt=["ab"] * 9, **searching)
        while not model.engine.running or not order:
            time.sleep(0.001)
        pool.submit(ask, served, "one")
        pool.submit(ask, served, "search", prompt="cd", **searching)
    assert ends["one"] < ends["many"] - 0.5  # of 32 steps in slots of four, each 0.05 s
    found = [tokens == order[0] for tokens in order]
    assert 0 < found.index(False) < 5


def test_lower_priorities_go_first(model, slow_steps):
    ends = {}

    def ask(served, name, **more):
        assert post(served, json=ASKED | {"max_tokens": 3} | more).status_code == 200
        ends[name] = time.monotonic()

    with running(lambda: model) as served, concurrent.futures.ThreadPoolExecutor(9) as pool:
        slots, worker = model.engine.slots, served.service.worker
        asking = [pool.submit(ask, served, "first", n=slots, max_tokens=12)]
        while model.engine.running < slots:
            time.sleep(0.001)
        kinds = {"later": {"n": slots, "priority": 2}, "now": {"n": slots}, "sooner": {"n": slots}}
        kinds["sooner"]["priority"] = -1
        for name, more in kinds.items():
            before = worker.running
            asking.append(pool.submit(ask, served, name, **more))
            while worker.running == before:
                time.sleep(0.001)
        for each in asking:
            each.result()
        assert sorted(ends, key=ends.get) == ["first", "sooner", "now", "later"]
        for path, body in (
            ("/v1/completions", ASKED),
            ("/v1/fill", {"text": "a"}),
            ("/v1/score", {"context": "a", "choices": ["b"]}),
        ):
            error = error_of(post(served, path, json=body | {"priority": 1001}), 400)
            assert "priority" in error["message"]
        scored = {"context": "a", "choices": ["b"], "priority": -3}
        assert post(served, "/v1/score", json=scored).status_code == 200
        filled = {"text": "a [MASK] b", "priority": -3, "max_tokens": 2}
        assert post(served, "/v1/fill", json=filled).status_code == 200


@pytest.mark.parametrize(
    ("serving", "name", "value"),
    [
        ({"keys": Keys(["10.0.0.1", "10.0.0.2"])}, "Authorization", "Bearer 10.0.0.{}"),
        ({"trusted_proxies": ["127.0.0.0/8"]}, "X-Forwarded-For", "1.1.1.1, 10.0.0.{}"),
    ],
    ids=["keys", "proxy"],
)
def test_who_fills_the_queue_shuts_no_one_out(model, slow_steps, serving, name, value):
    with (
        running(lambda: model, max_waiting=2, **serving) as served,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        room = model.engine.slots + 2
        ask = lambda client, **more: post(
            served, headers={name: value.format(client)}, json=ASKED | {"max_tokens": 8} | more
        )
        filling = pool.submit(ask, 1, n=room)
        while served.service.worker.running < room:
            time.sleep(0.001)
        assert ask(1).status_code == 429
        assert ask(2).status_code == 200
        assert filling.result().status_code == 200
