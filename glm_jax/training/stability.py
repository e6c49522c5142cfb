"""Stability: loss scaling, and skipping steps whose gradient is not finite or much too large."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int32

from glm_jax.training.recipe import Recipe

_INITIAL_SCALE, _MIN_SCALE, _MAX_SCALE = 2.0**15, 1.0, 2.0**24
_MIN_HISTORY = 8  # good steps before a norm can count as too large


@struct.dataclass
class Monitor:
    """Statistics of recent steps; arrays, or what describes them.

    Attributes:
      gradient_norms, losses: float32 [median_window] of the last good steps; NaN before there
        are as many.
      loss_scale: float32 [], multiplies the loss; 1 without loss scaling.
      good_steps: int32 [], number since the loss scale changed.
      bad_steps: int32 [], number skipped in a row, without those that only halve the loss scale.
      skipped: int32 [], number of all skipped steps.
    """

    gradient_norms: Any
    losses: Any
    loss_scale: Any
    good_steps: Any
    bad_steps: Any
    skipped: Any


def init_monitor(recipe: Recipe) -> Monitor:
    """Return the monitor before the first step."""
    nothing = jnp.full((recipe.median_window,), jnp.nan, jnp.float32)
    zero = jnp.zeros((), jnp.int32)
    scale = _INITIAL_SCALE if recipe.loss_scaling else 1.0
    return Monitor(nothing, nothing, jnp.float32(scale), zero, zero, zero)


def judge(
    monitor: Monitor, recipe: Recipe, loss: Float[Array, ""], norm: Float[Array, ""]
) -> tuple[Bool[Array, ""], Bool[Array, ""], Monitor]:
    """Decide whether a step may be taken.

    Args:
      loss: mean of the batch, in nats.
      norm: of the gradient, before clipping.

    Returns:
      is_good, False to skip the step; is_spike, True for a loss or norm far above the median;
      and the monitor after the step.
    """
    is_finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    is_large = jnp.zeros((), bool)
    if recipe.skip_factor > 0:
        # No norm is above NaN, the median before there is a history.
        is_large = norm > recipe.skip_factor * _median(monitor.gradient_norms)
    is_good = is_finite & ~is_large
    is_spike = ~is_good | (loss > _median(monitor.losses) + recipe.spike_loss)
    scale, good_steps = monitor.loss_scale, monitor.good_steps
    only_overflow = jnp.zeros((), bool)
    if recipe.loss_scaling:
        only_overflow = ~is_finite & (scale > _MIN_SCALE)
        grows = is_finite & (good_steps + 1 >= recipe.loss_scale_window)
        scale = jnp.where(is_finite, jnp.where(grows, 2 * scale, scale), scale / 2)
        scale = jnp.clip(scale, _MIN_SCALE, _MAX_SCALE)
        good_steps = jnp.where(is_finite & ~grows, good_steps + 1, 0)
    bad_steps = jnp.where(is_good, 0, monitor.bad_steps + ~only_overflow)
    after = Monitor(
        gradient_norms=_append(monitor.gradient_norms, norm, is_good),
        losses=_append(monitor.losses, loss, is_good),
        loss_scale=scale,
        good_steps=good_steps,
        bad_steps=bad_steps.astype(jnp.int32),
        skipped=monitor.skipped + ~is_good,
    )
    return is_good, is_spike, after


def _median(history: Float[Array, " window"]) -> Float[Array, ""]:
    """Return the median of the values so far, NaN while there are too few."""
    enough = jnp.sum(~jnp.isnan(history)) >= min(_MIN_HISTORY, history.shape[0])
    return jnp.where(enough, jnp.nanmedian(history), jnp.nan)


def _append(history: Array, value: Array, is_good: Array) -> Array:
    return jnp.where(is_good, jnp.append(history[1:], value), history)


@jax.custom_vjp
def shrink_gradient(x: Float[Array, "..."], factor: Float[Array, ""]) -> Float[Array, "..."]:
    """Return x; its gradient is multiplied by `factor` (arXiv:2210.02414, section 3)."""
    return x


shrink_gradient.defvjp(
    lambda x, factor: (x, factor), lambda factor, g: (g * factor.astype(g.dtype), None)
)


def embedding_factor(recipe: Recipe, samples: Int32[Array, ""]) -> Float[Array, ""]:
    """Return the factor of the embedding's gradient after `samples` rows."""
    start = jnp.float32(recipe.embedding_gradient)
    if recipe.embedding_gradient_samples == 0:
        return start
    done = jnp.minimum(samples / recipe.embedding_gradient_samples, 1.0)
    return start + (1 - start) * done
