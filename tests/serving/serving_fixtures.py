"""A small model, and a server of it, for each file of tests."""

import time

import pytest
from served import running, tiny_served


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_served(tokenizer)


@pytest.fixture(scope="module")
def served(model):
    with running(lambda: model) as served:
        yield served


@pytest.fixture
def slow_steps(model, monkeypatch, request):
    """Every step takes a twentieth of a second more, or what is asked for; when each began."""
    pause = getattr(request, "param", 0.05)
    real, steps = type(model.engine).step, []

    def step(engine):
        steps.append(time.monotonic())
        time.sleep(pause)
        return real(engine)

    monkeypatch.setattr(type(model.engine), "step", step)
    return steps
