"""The preferred backend that supports the arguments is the one that is compiled."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest

from glm_jax.kernels import target
from glm_jax.kernels.dispatch import BackendError, dispatch


@dataclasses.dataclass(frozen=True)
class Times:
    """Multiplies by a factor, and does not take arrays longer than `longest`."""

    name: str
    factor: int
    platform: str | None = None
    longest: int = 100

    def supports(self, x):
        return f"it takes {self.longest} numbers" if x.size > self.longest else None

    def __call__(self, x):
        return self.factor * x


BACKENDS = (
    Times("elsewhere", 5, "cuda"),
    Times("short", 2, "cpu", longest=2),
    Times("middle", 3, longest=4),
    Times("any", 4),
)


@pytest.mark.parametrize(("length", "factor"), [(2, 2), (4, 3), (5, 4)])
def test_the_first_that_supports_the_arguments_here(length, factor):
    run = jax.jit(lambda x: dispatch("times", BACKENDS, x))
    assert run(jnp.ones(length))[0] == factor
    text = run.lower(jnp.ones(length)).compile().as_text()
    assert text.count("multiply(") == 1  # one backend is left, and nothing chooses at run time
    assert "conditional" not in text


def test_one_that_runs_everywhere_is_called_as_it_is():
    jaxpr = jax.make_jaxpr(lambda x: dispatch("times", BACKENDS[2:], x))(jnp.ones(2))
    assert [equation.primitive.name for equation in jaxpr.eqns] == ["mul"]


def test_by_name():
    forced = lambda name, length: dispatch("times", BACKENDS, jnp.ones(length), name)
    assert forced("any", 1)[0] == 4
    assert forced("short", 2)[0] == 2
    both = (*BACKENDS, Times("short", 7, longest=9))
    assert dispatch("times", both, jnp.ones(9), "short")[0] == 7
    with pytest.raises(BackendError, match=r"^times: the backend 'short' .* it takes 2 numbers$"):
        forced("short", 3)
    with pytest.raises(BackendError, match="it runs on cuda, and this is cpu"):
        forced("elsewhere", 1)
    with pytest.raises(BackendError, match="'shor'; expected one of elsewhere, short, middle, any"):
        forced("shor", 1)


def test_the_compute_capability_is_what_the_device_says(monkeypatch):
    assert target.compute_capability() == 0 or target.platform() == "cuda"
    device = types.SimpleNamespace(
        platform="gpu", device_kind="NVIDIA Next", compute_capability="8.9"
    )
    monkeypatch.setattr(target.backend, "get_default_device", lambda: device)
    assert target.compute_capability() == 8.9
