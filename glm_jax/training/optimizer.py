"""AdamW or Adafactor with gradient clipping; the learning rate is a function of samples.

An optimiser is an optax transformation (`make_optimizer`): another one is a branch there and a
name in `recipe.MOMENTS`. Its state is sharded and checkpointed as optax describes it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from glm_jax.training.quantized_moments import scale_by_quantized_adam
from glm_jax.training.recipe import Recipe


def learning_rate(recipe: Recipe, samples: Int[Array, ""] | int) -> Float[Array, ""]:
    """Return the learning rate after `samples` rows: linear warm-up, then cosine decay."""
    warmup = max(1, round(recipe.warmup_fraction * recipe.total_samples))
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=recipe.initial_learning_rate,
        peak_value=recipe.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(recipe.total_samples, warmup + 1),
        end_value=recipe.final_learning_rate_fraction * recipe.learning_rate,
    )
    return schedule(samples)


def make_optimizer(recipe: Recipe, decays: Any) -> optax.GradientTransformation:
    """Return AdamW (arXiv:2210.02414, section 2.3) or Adafactor, without the learning rate.

    It takes clipped gradients; the caller multiplies its updates by the negative learning rate.

    Args:
      decays: tree of bools in the form of the parameters; see `trained_params.decay_mask`.
    """
    return optax.chain(
        _scale_by_moments(recipe), optax.add_decayed_weights(recipe.weight_decay, decays)
    )


def clipping(norm: Float[Array, ""], recipe: Recipe) -> Float[Array, ""]:
    """Return the factor that scales gradients of a global norm down to the recipe's."""
    return jnp.minimum(1.0, recipe.gradient_clip / jnp.maximum(norm, recipe.gradient_clip))


def _scale_by_moments(recipe: Recipe) -> optax.GradientTransformation:
    """Return the transformation that divides gradients by the root of their mean square."""
    if recipe.moments == "factored":
        # Adafactor without scaling by the parameters' size: learning rates are Adam's.
        return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    scale_by = scale_by_quantized_adam if recipe.moments == "int8" else optax.scale_by_adam
    return scale_by(recipe.beta1, recipe.beta2, recipe.epsilon)


def apply_updates(params: Any, updates: Any, key: PRNGKeyArray) -> Any:
    """Return params + updates, with stochastic rounding of bfloat16 parameters.

    Rounding to nearest would lose every update smaller than half the last bit.
    """
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))

    def apply(param: Array, update: Array, key: PRNGKeyArray) -> Array:
        moved = param.astype(jnp.float32) + update
        if param.dtype != jnp.bfloat16:
            return moved.astype(param.dtype)
        # Add noise below the last bit of bfloat16, then truncate.
        noise = jax.random.bits(key, param.shape, jnp.uint16).astype(jnp.uint32)
        bits = jax.lax.bitcast_convert_type(moved, jnp.uint32) + noise
        cut = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
        return jnp.where(jnp.isfinite(moved), cut, moved).astype(jnp.bfloat16)

    moved = map(apply, leaves, jax.tree.leaves(updates), keys)
    return jax.tree.unflatten(structure, list(moved))
