"""This project's programs compiled for devices that are not here, and what they would take."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glm_jax.config import GLMConfig
from glm_jax.model.params import GLMParams
from glm_jax.planning.collectives import by_kind, in_lines
from glm_jax.planning.topology import compiling_for
from glm_jax.sharding import activation_spec
from glm_jax.training.recipe import Recipe
from glm_jax.training.state import Batch, TrainState, abstract_state, state_shardings
from glm_jax.training.step import compiled_train_step


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


def lower_train_step(
    model: GLMConfig,
    recipe: Recipe,
    mesh: Mesh,
    *,
    accumulation: int,
    micro_batch: int,
    sequence_length: int,
    frozen: GLMParams | None = None,
) -> Any:
    """The train step of a run, lowered for the devices of `mesh`.

    Args:
      frozen: the model beside adapters, described, where the recipe has these.
    """
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
    state = described_state(model, recipe, mesh)
    with compiling_for(mesh):
        return step.lower(state, frozen, batch, key)


def described_state(model: GLMConfig, recipe: Recipe, mesh: Mesh) -> TrainState:
    """What a train step takes, on devices that are not here; moments may wait on hosts."""
    state: TrainState = jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        abstract_state(model, recipe, mesh),
        state_shardings(model, recipe, mesh),
    )
    return state


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
    return by_kind(in_lines(compiled.as_text().splitlines()))
