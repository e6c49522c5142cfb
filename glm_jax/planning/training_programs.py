"""The train step compiled for devices that are not here, and the memory that it needs."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from glm_jax.config import GLMConfig
from glm_jax.model.params import GLMParams
from glm_jax.planning.topology import compiling_for
from glm_jax.sharding import activation_sharding, replicated
from glm_jax.training.recipe import Recipe
from glm_jax.training.state import TrainBatch, TrainState, abstract_state, state_shardings
from glm_jax.training.step import compiled_train_step, with_attention_for

_GROUPS = 9  # kinds of samples: the size of a few small sums


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      reused: part of the arguments, donated to outputs.
      on_host: temporaries in the host's memory.
    """

    arguments: int
    outputs: int
    reused: int
    temporaries: int
    on_host: int = 0

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
    """Lower the train step of a run for the devices of `mesh`.

    Args:
      accumulation: number of micro-batches.
      micro_batch: rows that the devices take at once.
      frozen: description of the model beside adapters, if the recipe has these.
    """
    shape = (accumulation, micro_batch, sequence_length)
    sharding = activation_sharding(mesh, (None, "batch", "seq"))
    integers = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
    floats = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    fields: Any = dict.fromkeys([field.name for field in dataclasses.fields(TrainBatch)], integers)
    batch = TrainBatch(**fields | {"loss_weights": floats})
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(mesh))
    with compiling_for(mesh):
        recipe = with_attention_for(model, recipe, mesh, micro_batch, sequence_length)
    step: Any = compiled_train_step(model, recipe, _GROUPS, mesh)
    state = described_state(model, recipe, mesh)
    with compiling_for(mesh):
        return step.lower(state, frozen, batch, key)


def described_state(model: GLMConfig, recipe: Recipe, mesh: Mesh) -> TrainState:
    """Describe the state that a train step takes; offloaded moments are in hosts' memory."""
    return jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        abstract_state(model, recipe, mesh),
        state_shardings(model, recipe, mesh),
    )


def memory(compiled: Any) -> Memory:
    """Return the memory that a compiled program needs."""
    analysis = compiled.memory_analysis()
    return Memory(
        arguments=analysis.argument_size_in_bytes,
        outputs=analysis.output_size_in_bytes,
        reused=analysis.alias_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        on_host=analysis.host_temp_size_in_bytes,
    )
