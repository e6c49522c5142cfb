"""This project's programs compiled for devices that are not here, and what they would take."""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glm_jax.config import GLMConfig
from glm_jax.sharding import activation_spec
from glm_jax.training.recipe import Recipe
from glm_jax.training.state import Batch, abstract_state
from glm_jax.training.step import compiled_train_step

_COLLECTIVE = re.compile(
    r"= (?P<type>.*?) (?P<kind>all-gather|all-to-all|all-reduce|reduce-scatter|"
    r"collective-permute)(?P<start>-start)?\("
)
_ARRAY = re.compile(r"(\w+?)\[([\d,]*)\]")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes a device: what goes in (of it `reused`, for what comes out), and what a program
    needs besides."""

    arguments: int
    outputs: int
    reused: int
    temporaries: int

    @property
    def total(self) -> int:
        return self.arguments + self.outputs - self.reused + self.temporaries


def compile_train_step(
    model: GLMConfig,
    recipe: Recipe,
    mesh: Mesh,
    *,
    accumulation: int,
    micro_batch: int,
    sequence_length: int,
) -> Any:
    """The train step of a run, compiled for the devices of `mesh`."""
    shape = (accumulation, micro_batch, sequence_length)
    sharding = NamedSharding(mesh, PartitionSpec(None, *activation_spec(("batch", "seq"))))
    integers = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
    names = [field.name for field in dataclasses.fields(Batch)]
    described: Any = dict.fromkeys(names, integers)
    batch = Batch(**described)
    floats = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    batch = batch.replace(loss_weights=floats)  # type: ignore[attr-defined]
    key = jax.eval_shape(lambda: jax.random.key(0))
    whole = NamedSharding(mesh, PartitionSpec())
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole)
    step: Any = compiled_train_step(model, recipe, 9, mesh)
    with jax.set_mesh(mesh):
        return step.lower(abstract_state(model, recipe, mesh), batch, key).compile()


def memory(compiled: Any) -> Memory:
    """What a compiled program takes of a device's memory."""
    found = compiled.memory_analysis()
    return Memory(
        arguments=found.argument_size_in_bytes,
        outputs=found.output_size_in_bytes,
        reused=found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
    )


def collectives(compiled: Any) -> dict[str, tuple[int, int]]:
    """Exchanges that the text of a program has, by kind: how many, and bytes a device of
    their results. What stands in a loop counts once."""
    counted: dict[str, tuple[int, int]] = {}
    for line in compiled.as_text().splitlines():
        match = _COLLECTIVE.search(line)
        if match is None:
            continue
        arrays = [
            _BYTES.get(dtype, 4) * math.prod(map(int, filter(None, sizes.split(","))))
            for dtype, sizes in _ARRAY.findall(match["type"])
        ]
        # An asynchronous one's type has its operands, then its results.
        size = sum(arrays[len(arrays) // 2 :] if match["start"] else arrays)
        count, total = counted.get(match["kind"], (0, 0))
        counted[match["kind"]] = (count + 1, total + size)
    return counted
