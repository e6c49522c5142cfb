"""AdamW with warm-up, cosine decay and gradient clipping, all by optax."""

from typing import Any

import jax
import optax
from ml_collections import ConfigDict


def learning_rate(config: ConfigDict, steps: int) -> optax.Schedule:
    """Learning rate of each step: linear warm-up, then cosine to a fraction of the peak."""
    warmup = max(1, round(config.warmup_fraction * steps))
    return optax.warmup_cosine_decay_schedule(
        init_value=config.initial_learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=config.final_learning_rate_fraction * config.learning_rate,
    )


def make_optimizer(config: ConfigDict, steps: int) -> optax.GradientTransformation:
    """AdamW (arXiv:2210.02414, section 2.3); biases and layernorms do not decay."""
    return optax.chain(
        optax.clip_by_global_norm(config.gradient_clip),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        ),
    )


def decay_mask(params: Any) -> Any:
    """Of a tree of parameters, True for the word embedding and the linears' kernels."""

    def is_decayed(path: tuple[jax.tree_util.GetAttrKey, ...], _: object) -> bool:
        return path[-1].name in ("kernel", "word_embeddings")

    return jax.tree_util.tree_map_with_path(is_decayed, params)
