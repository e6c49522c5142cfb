"""A sweep finds the remat of each batch that recomputes least and fits; copies to hosts count."""

import dataclasses
import importlib

import jax
import pytest

from glm_jax.config import glm_config
from glm_jax.model.training import REMAT_POLICIES
from glm_jax.planning import plan, sweep, training_programs
from glm_jax.planning.plan import Plan, PlanRequest
from glm_jax.planning.roofline import Work, roofline
from glm_jax.sharding import make_mesh
from glm_jax.training.recipe import Recipe

GIB = 2**30
REQUEST = PlanRequest(
    glm_config("tiny"), "train", "float32", (1, 1, 1), 1, 64, recipe=Recipe(total_samples=1)
)
# GiB a row on the device and on its host, and the share of products that are computed again.
SAVED = {
    "none": (45, 0, 0.0),
    "dots": (25, 0, 0.01),
    "offload": (12, 10, 0.01),
    "attention": (8, 0, 0.2),
    "blocks": (2, 0, 0.33),
}


@pytest.fixture(scope="module")
def h100():
    return importlib.import_module("configs.hardware.h100").get_config()


def _planned(hardware, flops_of_a_row):
    """`make_plan` of jobs that need what SAVED says."""

    def make(request, _):
        on_device, on_host, again = SAVED[request.recipe.remat]
        work = Work(
            flops=request.batch * flops_of_a_row * (1 + again),
            memory_bytes=0.0,
            link_bytes=0.0,
            host_bytes=2.0 * request.batch * on_host * GIB,
        )
        return Plan(
            weights=0,
            cache=0,
            optimizer=0,
            other=0,
            temporaries=request.batch * on_device * GIB,
            streamed=request.batch * on_host * GIB,
            room=hardware.memory_bytes,
            collectives=(),
            work=work,
            roofline=roofline(work, hardware),
        )

    return make


def _sweep(hardware, flops_of_a_row, monkeypatch):
    assert tuple(SAVED) == REMAT_POLICIES
    monkeypatch.setattr(sweep, "make_plan", _planned(hardware, flops_of_a_row))
    shown = []
    fitting = sweep.sweep(REQUEST, hardware, shown.append)
    of = lambda results: [(r.request.batch, r.request.recipe.remat) for r in results]
    return of(shown), of(fitting), fitting


def test_each_batch_has_the_remat_that_recomputes_least_and_fits(h100, monkeypatch):
    """Products that take long hide the copies."""
    copies = 2 * 10 * GIB / h100.host_bandwidth
    shown, fitting, results = _sweep(h100, 2 * copies * h100.matrix_flops, monkeypatch)
    assert shown == [
        (1, "none"),
        (2, "none"),
        (2, "dots"),
        (4, "dots"),
        (4, "offload"),
        (8, "offload"),
        (8, "attention"),
        (16, "attention"),
        (16, "blocks"),
        (32, "blocks"),
        (64, "blocks"),
    ]
    best = {(1, "none"), (2, "dots"), (4, "offload"), (8, "attention"), (16, "blocks")}
    assert set(fitting) == best | {(32, "blocks")}
    assert {r.plan.roofline.limit for r in results} == {"compute"}


def test_where_copies_to_hosts_bind_the_next_is_tried_too(h100, monkeypatch):
    """The batch has both plans, the faster one first."""
    copies = 2 * 10 * GIB / h100.host_bandwidth
    shown, fitting, results = _sweep(h100, copies * h100.matrix_flops / 2, monkeypatch)
    assert shown[4:7] == [(4, "offload"), (4, "attention"), (8, "attention")]
    assert fitting.index((4, "attention")) < fitting.index((4, "offload"))
    [offloaded] = [r for r in results if r.request.recipe.remat == "offload"]
    assert offloaded.plan.roofline.limit == "host"
    assert offloaded.plan.roofline.seconds == pytest.approx(4 * copies)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_plan_counts_what_a_step_copies_to_hosts(accumulation, h100, monkeypatch):
    """Each micro-batch there and back."""
    needed = training_programs.Memory(arguments=0, outputs=0, reused=0, temporaries=0, on_host=100)
    monkeypatch.setattr(plan, "memory", lambda _: needed)
    monkeypatch.setattr(plan, "find_collectives", lambda *_: [])
    recipe = dataclasses.replace(REQUEST.recipe, remat="offload")
    request = dataclasses.replace(REQUEST, recipe=recipe, accumulation=accumulation)
    mesh = make_mesh((1, 1, 1), jax.devices()[:1])
    compiled = jax.jit(lambda x: x).lower(1.0).compile()
    found = plan._measure(request, request.model, mesh, None, compiled, h100)
    assert found.streamed == 100
    assert found.work.host_bytes == 2 * 100 * accumulation
    assert found.roofline.host == 200 * accumulation / h100.host_bandwidth
