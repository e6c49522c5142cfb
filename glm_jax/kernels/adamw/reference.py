"""AdamW as the formula says it."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from glm_jax.kernels.adamw.arguments import Arguments
from glm_jax.kernels.dispatch import PlainFormula


class Reference(PlainFormula):
    """Takes everything."""

    def __call__(self, arguments: Arguments) -> Any:
        a = arguments
        gradient = a.gradient * a.factor
        first = a.beta1 * a.first + (1 - a.beta1) * gradient
        second = a.beta2 * a.second + (1 - a.beta2) * gradient**2
        root = jnp.sqrt(second / a.corrections[1])
        direction = first / a.corrections[0] / (root + a.epsilon) + a.decay * a.param
        change = -a.rate * direction

        def choose(new: Array, old: Array) -> Array:
            return jnp.where(a.is_good, new, old)

        return (
            choose(a.param + change, a.param),
            choose(first, a.first),
            choose(second, a.second),
            jnp.sum(change**2),
        )
