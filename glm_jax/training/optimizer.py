"""AdamW with gradient clipping, all by optax; the learning rate follows samples."""

from typing import Any

import jax
import optax
from jaxtyping import Array, Float, Int

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
    """AdamW (arXiv:2210.02414, section 2.3) but for the learning rate, which multiplies
    what it gives; biases and layernorms do not decay."""
    return optax.chain(
        optax.clip_by_global_norm(recipe.gradient_clip),
        optax.scale_by_adam(recipe.beta1, recipe.beta2, recipe.epsilon),
        optax.add_decayed_weights(recipe.weight_decay, decay_mask),
    )


def decay_mask(params: Any) -> Any:
    """Of a tree of parameters, True for the word embedding and the linears' kernels."""

    def is_decayed(path: tuple[Any, ...], _: object) -> bool:
        return path[-1].name in ("kernel", "word_embeddings")

    return jax.tree_util.tree_map_with_path(is_decayed, params)
