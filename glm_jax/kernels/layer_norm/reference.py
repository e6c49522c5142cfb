"""Layer normalisation as the formula says it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from glm_jax.kernels.dispatch import PlainFormula
from glm_jax.kernels.layer_norm.arguments import Arguments


class Reference(PlainFormula):
    """Takes everything."""

    def __call__(self, arguments: Arguments) -> Array:
        a = arguments
        wide = a.x.astype(jnp.float32)
        mean = jnp.mean(wide, axis=-1, keepdims=True)
        centred = wide - mean
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(variance + a.epsilon)
        return (normed * a.scale + a.bias).astype(a.x.dtype)
