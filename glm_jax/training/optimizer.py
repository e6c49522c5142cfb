"""AdamW or Adafactor with gradient clipping; the learning rate follows samples."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from glm_jax.training.quantized_moments import scale_by_narrow_adam
from glm_jax.training.recipe import Recipe


def learning_rate(recipe: Recipe, samples: Int[Array, ""] | int) -> Float[Array, ""]:
    """Learning rate after so many samples: linear warm-up, then cosine."""
    warmup = max(1, round(recipe.warmup_fraction * recipe.total_samples))
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=recipe.initial_learning_rate,
        peak_value=recipe.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(recipe.total_samples, warmup + 1),
        end_value=recipe.final_learning_rate_fraction * recipe.learning_rate,
    )
    return schedule(samples)


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW (arXiv:2210.02414, section 2.3), or Adafactor, of clipped gradients, but for the
    learning rate, which multiplies what it gives; biases and layernorms do not decay."""
    return optax.chain(
        optax.identity(),  # where clipping stood: checkpoints number what comes after it
        _scale_by_moments(recipe),
        optax.add_decayed_weights(recipe.weight_decay, decay_mask),
    )


def clipping(norm: Float[Array, ""], recipe: Recipe) -> Float[Array, ""]:
    """What gradients of a global norm are multiplied by, to have no more than the recipe's."""
    return jnp.minimum(1.0, recipe.gradient_clip / jnp.maximum(norm, recipe.gradient_clip))


def _scale_by_moments(recipe: Recipe) -> optax.GradientTransformation:
    """What divides gradients by the root of their mean square."""
    if recipe.moments == "factored":
        # As Adafactor, but that steps do not grow with parameters: learning rates are Adam's.
        return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    scale_by = scale_by_narrow_adam if recipe.moments == "int8" else optax.scale_by_adam
    return scale_by(recipe.beta1, recipe.beta2, recipe.epsilon)


def apply_updates(params: Any, updates: Any, key: PRNGKeyArray) -> Any:
    """params + updates; bfloat16 parameters are rounded by chance, so that updates smaller
    than half their last bit are not lost but happen as often as they are large."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))

    def apply(param: Array, update: Array, key: PRNGKeyArray) -> Array:
        moved = param.astype(jnp.float32) + update
        if param.dtype != jnp.bfloat16:
            return moved.astype(param.dtype)
        # Noise below the last bit that is kept, then the rest is cut off.
        noise = jax.random.bits(key, param.shape, jnp.uint16).astype(jnp.uint32)
        bits = jax.lax.bitcast_convert_type(moved, jnp.uint32) + noise
        cut = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
        return jnp.where(jnp.isfinite(moved), cut, moved).astype(jnp.bfloat16)

    moved = map(apply, leaves, jax.tree.leaves(updates), keys)
    return jax.tree.unflatten(structure, list(moved))


def decay_mask(params: Any) -> Any:
    """Of a tree of parameters, True for the word embedding, the linears' kernels and
    their adapters."""

    def is_decayed(path: tuple[Any, ...], _: object) -> bool:
        return path[-1].name in ("kernel", "word_embeddings", "down", "up")

    return jax.tree_util.tree_map_with_path(is_decayed, params)
