"""The library's attention is taken only where a call of it can be traced."""

import logging
import sys
from types import ModuleType

import jax.numpy as jnp
import pytest

from glm_jax.kernels.attention import library

BASE, KERNEL = (f"tokamax._src.ops.attention.{name}" for name in ("base", "pallas_triton"))


class Mask:
    def __init__(self, *, k_start, k_end):
        assert k_start.shape == k_end.shape == (1, 1, 1, 64)


class Kernel:
    def __call__(self, query, key, value, *, mask):
        return query * jnp.sum(key) * jnp.sum(value)


class KernelOfOtherArguments:
    def __call__(self, query, key, value, *, bias):
        return query


class KernelOfOtherShape(Kernel):
    def __call__(self, query, key, value, *, mask):
        return query[..., 0, :]


@pytest.fixture
def install(monkeypatch):
    """Puts a library in place of the real one."""

    def put(**kernel):
        for name in ("tokamax", "tokamax._src", "tokamax._src.ops", "tokamax._src.ops.attention"):
            package = ModuleType(name)
            package.__path__ = []
            monkeypatch.setitem(sys.modules, name, package)
        base, module = ModuleType(BASE), ModuleType(KERNEL)
        base.Mask = Mask
        for name, value in kernel.items():
            setattr(module, name, value)
        monkeypatch.setitem(sys.modules, BASE, base)
        monkeypatch.setitem(sys.modules, KERNEL, module)

    library._modules.cache_clear()
    yield put
    library._modules.cache_clear()


def test_taken_where_it_works_and_its_missing_tuning_is_not_told(install, caplog):
    install(PallasTritonFlashAttention=Kernel)
    assert library._modules() == (Mask, Kernel)
    logger = logging.getLogger("absl")
    logger.propagate, before = True, logger.propagate
    logger.warning("Autotuning cache miss for %s on %s with key %s", 1, 2, 3)
    logger.warning("something else")
    logger.propagate = before
    assert [record.getMessage() for record in caplog.records] == ["something else"]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({}, "AttributeError"),
        ({"PallasTritonFlashAttention": KernelOfOtherArguments}, "mask"),
        ({"PallasTritonFlashAttention": KernelOfOtherShape}, "cannot be used"),
    ],
)
def test_left_out_with_a_warning_where_it_does_not(install, found, words):
    install(**found)
    with pytest.warns(UserWarning, match=words):
        assert library._modules() is None


@pytest.mark.filterwarnings("error")
def test_left_out_silently_where_it_is_not_installed(install, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'tokamax'", name="tokamax")

    monkeypatch.setattr(library.importlib, "import_module", missing)
    assert library._modules() is None
