"""Collectives of programs, counted from their text."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from glm_jax.planning.collectives import Collective, Traffic, by_kind, find_collectives, traffic
from glm_jax.planning.roofline import Work, roofline
from glm_jax.sharding import make_mesh

STEPS = 5


def _program(mesh, steps):
    """A product whose contraction is divided, so that it is summed, in a loop and once after."""

    def run(x, weight, count):
        body = lambda _, y: jnp.tanh(y @ weight)
        y = jax.lax.fori_loop(0, STEPS if steps is None else count, body, x)
        return y @ weight

    place = lambda shape, *spec: jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec))
    )
    whole = NamedSharding(mesh, PartitionSpec())
    run = jax.jit(run, out_shardings=whole)
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    return run.lower(place((4, 64), None, "tensor"), place((64, 64), "tensor", None), count)


@pytest.mark.parametrize("steps", [None, "given"])
def test_loops_count_as_often_as_they_run(steps):
    """Known to the program, or told."""
    text = _program(make_mesh((1, 1, 8)), steps).compile().as_text()
    found = find_collectives(text, loops=STEPS)
    reduced = [e for e in found if e.kind in ("all-reduce", "reduce-scatter")]
    assert sum(e.times for e in reduced) == STEPS + 1, text
    assert by_kind(found) == by_kind(list(reversed(found)))


def test_kinds_and_bytes_of_a_text():
    text = """
%body (p: (f32[8])) -> (f32[8]) {
  %a = f16[16,4]{1,0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
}

%add (a: f32[], b: f32[]) -> f32[] {
  %s = f32[] add(%a, %b)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%c, body=%body
  %g = (f32[8]{0}, f32[64]{0}) all-gather-start(%y), dimensions={0}
  %r = f32[8]{0} all-reduce(%z), to_apply=%add
}
"""
    found = find_collectives(text, loops=70)
    assert set(found) == {
        Collective("all-reduce", 128, 70, (0, 1)),
        Collective("all-gather", 256, 1),
        Collective("all-reduce", 32, 1),
    }
    assert by_kind(found) == {"all-reduce": (71, 70 * 128 + 32), "all-gather": (1, 256)}
    ring = functools.partial(pytest.approx, abs=1)
    together = traffic(found, 8, devices_per_host=8)
    assert together.network == 0
    assert together.link == ring(70 * 128 * 2 * 1 / 2 + 32 * 2 * 7 / 8 + 256 * 7 / 8)


@pytest.mark.parametrize(
    ("condition", "times"),
    [
        ("ROOT %r = pred[] compare(%i, %n), direction=LT", 3),
        ("ROOT %r = pred[] fusion(%i), kind=kLoop, calls=%fused", 4),
        ("ROOT %r = pred[] compare(%i, %n), direction=NE", 70),
        ("ROOT %r = pred[] and(%compare, %other)", 70),
    ],
)
def test_a_trip_count_that_only_the_condition_has(condition, times):
    """As of a loop that the collectives' pipeliner took a turn from; 70 where there is none."""
    text = f"""
%fused (i: s32[]) -> pred[] {{
  %n = s32[] constant(4)
  ROOT %r = pred[] compare(%i, %n), direction=LT
}}

%condition (p: (s32[], f32[8])) -> pred[] {{
  %i = s32[] get-tuple-element(%p), index=0
  {"" if "fused" in condition else "%n = s32[] constant(3)"}
  {condition}
}}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %a = f16[16,4]{{1,0}} all-reduce(%x), replica_groups={{{{0,1}}}}, to_apply=%add
}}

ENTRY %main (p: f32[8]) -> f32[8] {{
  %w = (s32[], f32[8]) while(%t), condition=%condition, body=%body
}}
"""
    assert find_collectives(text, loops=70) == [Collective("all-reduce", 128, times, (0, 1))]


@pytest.mark.parametrize(
    ("groups", "group"),
    [
        ("{{0,2,4},{1,3,5}}", (0, 2, 4)),
        ("[2,3]<=[6]", (0, 1, 2)),
        ("[2,3]<=[3,2]T(1,0)", (0, 2, 4)),
        ("[4,2]<=[2,2,2]T(0,2,1)", (0, 2)),
        ("mesh['axis_0'=3,'axis_1'=2] {'axis_0'}", (0, 2, 4)),
        ("mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_1','axis_2'}", (0, 1, 2, 3)),
    ],
)
def test_replica_groups(groups, group):
    """As XLA writes it: listed, counted off after a transposition, or by names of axes."""
    text = f"""
ENTRY %main (p: f32[8]) -> f32[8] {{
  %r = f32[8]{{0}} all-reduce(%z), replica_groups={groups}, to_apply=%add
}}
"""
    assert find_collectives(text, 1) == [Collective("all-reduce", 32, 1, group)]


def test_traffic_between_hosts_goes_over_the_network():
    gather = lambda *group: [Collective("all-gather", 1200, 1, group)]
    assert traffic(gather(0, 1, 2, 3), 16, devices_per_host=4) == Traffic(900, 0)
    # One device of each of three hosts, then two of each of two, who share the way.
    assert traffic(gather(0, 4, 8), 16, devices_per_host=4) == Traffic(0, 800)
    assert traffic(gather(0, 1, 4, 5), 16, devices_per_host=4) == Traffic(900, 450)
    scatter = [Collective("reduce-scatter", 100, 2, (0, 4, 8))]
    assert traffic(scatter, 16, devices_per_host=4) == Traffic(0, 2 * 100 * 2)


def test_the_slowest_is_the_roofline():
    hardware = ConfigDict({"matrix_flops": 1e12, "memory_bandwidth": 1e9, "link_bandwidth": 1e8})
    hardware.host_bandwidth, hardware.network_bandwidth = 1e7, 1e6
    found = roofline(Work(flops=1e12, memory_bytes=5e9, link_bytes=1e8), hardware)
    assert (found.compute, found.memory, found.link) == (1, 5, 1)
    assert found.seconds == 5
    assert found.limit == "memory"
    slow = roofline(Work(1e12, 5e9, 1e8, network_bytes=6e6, host_bytes=9e7), hardware)
    assert (slow.network, slow.host, slow.limit) == (6, 9, "host")
