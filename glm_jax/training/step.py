"""The train step: loss, gradients and update as one compiled program."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from glm_jax import compiler_settings
from glm_jax.config import ConfigError, GLMConfig
from glm_jax.kernels.attention.api import attention
from glm_jax.kernels.attention.mosaic_check import suits
from glm_jax.kernels.dispatch import BackendError
from glm_jax.kernels.target import FLOAT8_CAPABILITY
from glm_jax.model.layer_stacks import unstack_layers
from glm_jax.model.layers import Dropout, weight_dropout
from glm_jax.model.params import GLMParams, layer_parameter_count
from glm_jax.model.training import training_hidden
from glm_jax.model.visibility import Visibility
from glm_jax.numerics import FLOAT8, trained_products
from glm_jax.sharding import constrain_parameters, is_for_cpu, rows_of_a_device
from glm_jax.training.loss import cross_entropy
from glm_jax.training.optimizer import clipping, learning_rate
from glm_jax.training.recipe import Recipe
from glm_jax.training.stability import embedding_factor, judge, shrink_gradient
from glm_jax.training.state import TrainBatch, TrainState, is_stacked, state_shardings
from glm_jax.training.trained_params import (
    TrainedParams,
    decay_mask,
    logical_axes,
    whole_model,
)
from glm_jax.training.update import Step, update

Metrics = dict[str, Array]
_ROUNDING = 2**30  # salt of the key for rounding, above all numbers of micro-batches


def loss_sums(
    params: GLMParams,
    config: GLMConfig,
    batch: TrainBatch,
    recipe: Recipe,
    groups: int,
    dropout: Dropout | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Sum the cross-entropy, in nats, of the tokens whose loss weight is not 0.

    Args:
      batch: [batch, seq].
      groups: number of kinds of samples by dataset.

    Returns:
      The sum with z-loss, and a dictionary of sums: loss, hits, group_losses and group_counts
      [groups], and activation_scale [layers].
    """
    if is_for_cpu():
        params = unstack_layers(params)  # measured a fifth faster than the scan here
    visibility = Visibility.packed(batch.segment_ids, batch.context_length)
    hidden, scales = training_hidden(
        params,
        config,
        batch.tokens,
        batch.position_ids,
        visibility,
        recipe.remat,
        dropout,
        recipe.attention_implementation,
    )
    weights = batch.loss_weights
    chunk = max(1, recipe.loss_chunk // rows_of_a_device(len(weights)))
    total, (losses, hits) = cross_entropy(
        hidden, params.word_embeddings, batch.targets, weights, chunk, recipe.z_loss
    )
    of_groups = lambda x: jax.ops.segment_sum(x.ravel(), batch.groups.ravel(), groups)
    sums = {
        "loss": jnp.sum(losses * weights),
        "hits": jnp.sum(hits * weights),
        "group_losses": of_groups(losses * weights),
        "group_counts": of_groups(weights),
        "activation_scale": scales,
    }
    return total, sums


def _gradients(
    state: TrainState,
    frozen: GLMParams | None,
    batch: TrainBatch,
    config: GLMConfig,
    recipe: Recipe,
    groups: int,
    key: PRNGKeyArray,
) -> tuple[TrainedParams, Metrics]:
    """Return gradients of the mean loss times the loss scale over all micro-batches, and sums."""
    accumulation = batch.tokens.shape[0]
    scale = state.monitor.loss_scale / jnp.maximum(jnp.sum(batch.loss_weights), 1.0)
    factor = embedding_factor(recipe, state.samples)

    def scaled(
        trained: TrainedParams, part: TrainBatch, index: Array | int
    ) -> tuple[Array, Metrics]:
        params = whole_model(trained, frozen, recipe)
        if recipe.adapter is None:
            table = shrink_gradient(params.word_embeddings, factor)
            params = dataclasses.replace(params, word_embeddings=table)
        dropout = _dropout(recipe, jax.random.fold_in(key, index))
        total, sums = loss_sums(params, config, part, recipe, groups, dropout)
        return total * scale, sums

    gradient = jax.grad(scaled, has_aux=True)
    axes = logical_axes(config, recipe, is_stacked(state))
    if accumulation == 1:
        return gradient(state.params, jax.tree.map(lambda x: x[0], batch), 0)

    def add(total: Any, scanned: Any) -> tuple[Any, None]:
        gradients, sums = gradient(state.params, *scanned)
        gradients = constrain_parameters(gradients, axes)
        return jax.tree.map(jnp.add, total, (gradients, sums)), None

    first = jax.tree.map(lambda x: x[0], batch)
    shapes = jax.eval_shape(gradient, state.params, first, 0)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    start = (constrain_parameters(zeros[0], axes), zeros[1])
    (gradients, sums), _ = jax.lax.scan(add, start, (batch, jnp.arange(accumulation)))
    sums["activation_scale"] = sums["activation_scale"] / accumulation
    return gradients, sums


def _dropout(recipe: Recipe, key: PRNGKeyArray) -> Dropout | None:
    of_adapters = 0.0 if recipe.adapter is None else recipe.adapter.dropout
    if not (recipe.dropout or recipe.attention_dropout or of_adapters):
        return None
    return Dropout(key, recipe.dropout, recipe.attention_dropout, of_adapters)


def with_attention_for(
    config: GLMConfig, recipe: Recipe, mesh: Mesh, rows: int, sequence_length: int
) -> Recipe:
    """Return the recipe with the attention of a mesh's devices, before a step is compiled.

    `auto` becomes "mosaic" on devices whose check it passes; see `mosaic_check.suits`.

    Args:
      rows: of a micro-batch.

    Raises:
      ConfigError: the recipe names a backend that does not take what the step gives it; says why.
    """
    refusal = functools.partial(_refusal, config, mesh, rows, sequence_length)
    kernel = dataclasses.replace(recipe, attention="mosaic")
    if recipe.attention == "auto" and refusal(kernel) is None:
        dtype, size = config.activation_dtype, config.head_dim
        has_dropout = recipe.attention_dropout > 0
        return kernel if suits(mesh.devices.flat[0], dtype, size, has_dropout) else recipe
    if (reason := refusal(recipe)) is not None:
        raise ConfigError(f"optimizer.attention={recipe.attention!r}: {reason}")
    return recipe


def _refusal(
    config: GLMConfig, mesh: Mesh, rows: int, sequence_length: int, recipe: Recipe
) -> BackendError | None:
    """Why the recipe's attention cannot be computed on the mesh, None if it can."""
    heads, size, dtype = config.num_heads, config.head_dim, config.activation_dtype
    query = jax.ShapeDtypeStruct((rows, sequence_length, heads, size), dtype)
    key = jax.ShapeDtypeStruct((rows, heads, sequence_length, size), dtype)
    ranges = jax.ShapeDtypeStruct((rows, sequence_length, 2), jnp.int32)

    def attend(query: Array, key: Array, ranges: Array) -> Array:
        dropout = weight_dropout(Dropout(jax.random.key(0), 0.0, recipe.attention_dropout), 0)
        implementation = recipe.attention_implementation
        return attention(query, key, key, ranges, config.softmax_dtype, dropout, implementation)

    try:
        with jax.set_mesh(mesh):
            jax.eval_shape(attend, query, key, ranges)
    except BackendError as error:
        return error
    return None


def check_matmul_precision(config: GLMConfig, recipe: Recipe, device: Any) -> None:
    """Refuse products in float8 where devices have none, or the model's dtype no range for them.

    Args:
      device: one of the mesh, which may be only described.

    Raises:
      ConfigError: says why.
    """
    if recipe.matmul_precision != FLOAT8:
        return
    is_gpu = device.platform in ("gpu", "cuda")
    if config.compute_dtype == "float16":
        why = "float16 has no range for the scales: model.compute_dtype='bfloat16'"
    elif is_gpu and float(device.compute_capability) < FLOAT8_CAPABILITY:
        why = (
            f"{device.device_kind} has compute capability {device.compute_capability}, and no "
            f"float8 products before {FLOAT8_CAPABILITY}: leave it 'default'"
        )
    elif is_gpu or device.platform == "cpu":
        return
    else:
        why = f"it is for NVIDIA GPUs, not {device.device_kind}: leave it 'default'"
    raise ConfigError(f"optimizer.matmul_precision='{FLOAT8}': {why}")


@functools.cache
def compiled_train_step(
    config: GLMConfig, recipe: Recipe, groups: int, mesh: Mesh
) -> Callable[[TrainState, Any, TrainBatch, PRNGKeyArray], tuple[TrainState, Metrics]]:
    """Compile `train_step` for a mesh, to be called under it; the state is donated.

    The new state has the shardings of the old one: those that the compiler would choose may be
    equivalent and yet different, and compile the step once more.

    Raises:
      ConfigError: see `check_matmul_precision`.
    """
    check_matmul_precision(config, recipe, mesh.devices.flat[0])
    shardings = state_shardings(config, recipe, mesh)
    step = functools.partial(train_step, config=config, recipe=recipe, groups=groups)
    *_, tensor = mesh.axis_sizes
    exchanged = 0 if tensor == mesh.size else layer_parameter_count(config) // tensor
    platform = mesh.devices.flat[0].platform
    options = compiler_settings.of_training(platform, exchanged)
    return jax.jit(
        step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options or None
    )


def train_step(
    state: TrainState,
    frozen: GLMParams | None,
    batch: TrainBatch,
    key: PRNGKeyArray,
    config: GLMConfig,
    recipe: Recipe,
    groups: int,
) -> tuple[TrainState, Metrics]:
    """Update the state, or skip the step if the gradient is not finite or much too large.

    Args:
      frozen: the model beside adapters, None if all parameters are trained.
      batch: [accumulation, batch, seq].
      key: for dropout and rounding; the state's step is folded in.
      groups: see `loss_sums`.

    Returns:
      The new state, and metrics: float32 scalars loss, accuracy, gradient_norm, update_norm,
      learning_rate, loss_scale, is_skipped, is_spike and bad_steps; group_losses and
      group_counts [groups]; activation_scale [layers]. A skipped step leaves parameters,
      optimiser state and counts unchanged.
    """
    # The step after a skipped one drops other activations.
    key = jax.random.fold_in(jax.random.fold_in(key, state.step), state.monitor.skipped)
    with trained_products(config.compute_dtype, is_for_cpu(), recipe.matmul_precision):
        gradients, sums = _gradients(state, frozen, batch, config, recipe, groups, key)
    counted = jnp.maximum(jnp.sum(batch.loss_weights), 1.0)
    scale = state.monitor.loss_scale
    loss, norm = sums.pop("loss") / counted, optax.global_norm(gradients) / scale
    is_good, is_spike, monitor = judge(state.monitor, recipe, loss, norm)
    rate = learning_rate(recipe, state.samples)
    rounding = jax.random.fold_in(key, _ROUNDING)
    shared = Step(clipping(norm, recipe) / scale, rate, is_good, rounding)
    decays = decay_mask(config, recipe, is_stacked(state))
    params, opt_state, update_norm = update(
        state.params, gradients, state.opt_state, recipe, decays, shared
    )
    rows = batch.tokens.shape[0] * batch.tokens.shape[1]
    after = TrainState(
        step=state.step + is_good,
        samples=state.samples + rows * is_good,
        params=params,
        opt_state=opt_state,
        monitor=monitor,
    )
    metrics = {
        "loss": loss,
        "accuracy": sums.pop("hits") / counted,
        "gradient_norm": norm,
        "update_norm": update_norm,
        "learning_rate": rate,
        "loss_scale": state.monitor.loss_scale,
        "is_skipped": ~is_good,
        "is_spike": is_spike,
        "bad_steps": monitor.bad_steps,
    }
    return after, sums | {name: jnp.float32(value) for name, value in metrics.items()}


@functools.partial(jax.jit, static_argnames=("config", "recipe", "groups"))
def evaluation_step(
    trained: TrainedParams,
    frozen: GLMParams | None,
    batch: TrainBatch,
    config: GLMConfig,
    recipe: Recipe,
    groups: int,
) -> Metrics:
    """Return the sums of losses and counts by group, [groups] each, of a batch [1, batch, seq]."""
    part = jax.tree.map(lambda x: x[0], batch)
    params = whole_model(trained, frozen, recipe)
    with trained_products(config.compute_dtype, is_for_cpu(), recipe.matmul_precision):
        _, sums = loss_sums(params, config, part, recipe, groups)
    return {name: sums[name] for name in ("group_losses", "group_counts")}
