"""What keeps a run of months alive: loss scaling, and steps held against their past."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int32

from glm_jax.training.recipe import Recipe

_FIRST_SCALE, _LEAST_SCALE, _MOST_SCALE = 2.0**15, 1.0, 2.0**24
_LEAST_HISTORY = 8  # steps before a norm can be called too large


@struct.dataclass
class Monitor:
    """What is remembered from step to step; arrays, or what describes them.

    Attributes:
      gradient_norms, losses: float32 [median_window] of the last good steps; not a number
        where there was none yet.
      loss_scale: float32 [], by which the loss is multiplied, 1 without loss scaling.
      good_steps: int32 [], since the scale changed.
      bad_steps: int32 [], skipped in a row, but for those that only halve the loss scale.
      skipped: int32 [], of all.
    """

    gradient_norms: Any
    losses: Any
    loss_scale: Any
    good_steps: Any
    bad_steps: Any
    skipped: Any


def init_monitor(recipe: Recipe) -> Monitor:
    nothing = jnp.full((recipe.median_window,), jnp.nan, jnp.float32)
    zero = jnp.zeros((), jnp.int32)
    scale = _FIRST_SCALE if recipe.loss_scaling else 1.0
    return Monitor(nothing, nothing, jnp.float32(scale), zero, zero, zero)


def judge(
    monitor: Monitor, recipe: Recipe, loss: Float[Array, ""], norm: Float[Array, ""]
) -> tuple[Bool[Array, ""], Bool[Array, ""], Monitor]:
    """Whether a step may be taken.

    Args:
      norm: of the gradient, before clipping.

    Returns:
      Whether it is good, whether its loss or norm is a spike, and the monitor after it.
    """
    is_finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    is_large = jnp.zeros((), bool)
    if recipe.skip_factor > 0:
        # NaNs, from before there is a history, are above nothing.
        is_large = norm > recipe.skip_factor * _median(monitor.gradient_norms)
    is_good = is_finite & ~is_large
    is_spike = ~is_good | (loss > _median(monitor.losses) + recipe.spike_loss)
    scale, good_steps = monitor.loss_scale, monitor.good_steps
    only_overflow = jnp.zeros((), bool)
    if recipe.loss_scaling:
        only_overflow = ~is_finite & (scale > _LEAST_SCALE)
        grows = is_finite & (good_steps + 1 >= recipe.loss_scale_window)
        scale = jnp.where(is_finite, jnp.where(grows, 2 * scale, scale), scale / 2)
        scale = jnp.clip(scale, _LEAST_SCALE, _MOST_SCALE)
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
    """Of what there is; not a number while that is too little."""
    enough = jnp.sum(~jnp.isnan(history)) >= min(_LEAST_HISTORY, history.shape[0])
    return jnp.where(enough, jnp.nanmedian(history), jnp.nan)


def _append(history: Array, value: Array, is_good: Array) -> Array:
    return jnp.where(is_good, jnp.append(history[1:], value), history)


@jax.custom_vjp
def shrink_gradient(x: Float[Array, "..."], factor: Float[Array, ""]) -> Float[Array, "..."]:
    """x itself, whose gradient is multiplied by `factor` (arXiv:2210.02414, section 3)."""
    return x


shrink_gradient.defvjp(
    lambda x, factor: (x, factor), lambda factor, g: (g * factor.astype(g.dtype), None)
)


def embedding_factor(recipe: Recipe, samples: Int32[Array, ""]) -> Float[Array, ""]:
    """What the embedding's gradient is multiplied by after so many samples."""
    start = jnp.float32(recipe.embedding_gradient)
    if recipe.embedding_gradient_samples == 0:
        return start
    done = jnp.minimum(samples / recipe.embedding_gradient_samples, 1.0)
    return start + (1 - start) * done
