"""Kernels are checked by a process of their own, and attention takes those that pass."""

import sys
import warnings

import jax
import jax.numpy as jnp
import pytest

from glm_jax.kernels import self_check, target
from glm_jax.kernels.attention import mosaic_check
from glm_jax.kernels.attention.arguments import Arguments
from glm_jax.kernels.attention.blockwise import Blockwise
from glm_jax.kernels.attention.dropout import WeightDropout
from glm_jax.kernels.attention.mosaic import Mosaic


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("pass", None),
        ("print('a fault'); exit(1)", "its check failed: a fault"),
        ("raise SystemExit(3)", "its check failed: exit status 3"),
        ("import time; time.sleep(60)", "its check did not end within 0.5 seconds"),
    ],
)
def test_a_process_tells_what_is_wrong(code, reason):
    seconds = 0.5 if reason and "seconds" in reason else 60.0
    command = [sys.executable, "-S", "-c", code]
    assert self_check.check_apart("", "", command, seconds) == reason


class _Undropped(Blockwise):
    """Wrong where there is dropout."""

    def __call__(self, arguments):
        return super().__call__(arguments.replace(dropout=None))


class _WithoutGradient(Blockwise):
    """Wrong where there is a gradient of values."""

    def __call__(self, arguments):
        value = jax.lax.stop_gradient(arguments.value)
        return super().__call__(arguments.replace(value=value))


@pytest.mark.parametrize(
    ("backend", "fault"),
    [
        (Blockwise(), None),
        (_Undropped(), "output, dropout 0.1: a relative error of "),
        (_WithoutGradient(), "gradient of values, dropout 0.1: a relative error of 1"),
    ],
)
def test_outputs_and_gradients_are_compared(backend, fault):
    got = mosaic_check.first_fault(backend, "float16", 16, rates=[0.1], length=40)
    assert got is None if fault is None else got.startswith(fault)


class _GPU:
    platform, compute_capability = "gpu", "9.0"


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of this process, for which nothing has been checked."""
    device = _GPU()
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(target, "compute_capability", lambda: 9.0)
    monkeypatch.setattr(mosaic_check, "_right", set())
    return device


def _arguments(dropout):
    query, keys = jnp.zeros((1, 256, 2, 128), jnp.bfloat16), jnp.zeros((1, 2, 256, 128), "bfloat16")
    dropout = WeightDropout(jnp.uint32(0), 0.1) if dropout else None
    return Arguments(query, keys, keys, jnp.zeros((1, 256, 2), jnp.int32), dropout)


@pytest.mark.parametrize("has_dropout", [False, True])
def test_a_kernel_that_passes_is_taken(gpu, has_dropout):
    kernel, arguments = Mosaic(only_right=True), _arguments(has_dropout)
    asked = []
    for _ in range(2):
        mosaic_check.use_where_right(gpu, "bfloat16", 128, check=lambda *x: asked.append(x))
    assert asked == [("bfloat16", 128)]  # once
    assert kernel.supports(arguments) is None
    mosaic_check.use_where_right(gpu, "float32", 128, check=lambda *x: asked.append(x))
    assert len(asked) == 1


def test_a_kernel_that_fails_is_not_taken_and_a_line_says_why(gpu):
    with pytest.warns(UserWarning, match=r"^attention takes another backend .* slower: why$"):
        mosaic_check.use_where_right(gpu, "bfloat16", 128, check=lambda *_: "why")
    reason = Mosaic(only_right=True).supports(_arguments(True))
    assert reason == "it takes what its check has passed for"
    assert Mosaic().supports(_arguments(True)) is None  # by its name


def test_for_devices_elsewhere_it_is_taken_with_dropout(monkeypatch):
    monkeypatch.setattr(target, "compute_capability", lambda: 9.0)
    kernel = Mosaic(only_right=True)
    assert kernel.supports(_arguments(True)) is None
    assert kernel.supports(_arguments(False)) == "it takes what its check has passed for"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mosaic_check.use_where_right(_GPU(), "bfloat16", 128)  # described: nothing to check
