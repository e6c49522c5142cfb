"""What is no plan is called what it is: a compiler that is missing is no lack of memory."""

import importlib

import pytest
from ml_collections import ConfigDict

from glm_jax.config import glm_config
from glm_jax.planning import plan, sweep, topology
from glm_jax.planning.plan import CompilerError, PlanRequest

REQUEST = PlanRequest(glm_config("tiny"), "decode", "float16", (1, 1, 2), 1, 64)


@pytest.mark.parametrize("ask", [sweep.attempt, lambda *given: sweep.sweep(*given, print)])
def test_a_missing_compiler_ends_a_sweep(ask, monkeypatch):
    def missing(*_):
        raise RuntimeError("topology not implemented for cuda")

    monkeypatch.setattr(topology, "devices", missing)
    hardware = importlib.import_module("configs.hardware.a100_40gb").get_config()
    with pytest.raises(CompilerError, match=r"its compiler is not here .*glm_jax\[aot\]"):
        ask(REQUEST, hardware)


def test_what_cannot_be_planned_is_kept_as_a_reason(monkeypatch):
    def no_topology(*_):
        raise ValueError("no topology has 2 chips")

    monkeypatch.setattr(plan.topology, "devices", no_topology)
    hardware = importlib.import_module("configs.hardware.tpu_v5p").get_config()
    assert "no topology has 2 chips" in sweep.attempt(REQUEST, hardware).error


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_numbers_of_hardware_are_above_zero(value):
    hardware = importlib.import_module("configs.hardware.h100").get_config()
    plan.check_hardware("h100", hardware)
    hardware = ConfigDict(hardware.to_dict() | {"memory_bandwidth": value})
    with pytest.raises(plan.PlanError, match=r"h100\.py: memory_bandwidth=.*: expected a number"):
        plan.check_hardware("h100", hardware)
