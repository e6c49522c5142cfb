"""Layer normalisation over the last axis."""

from jaxtyping import Array, Float

from glm_jax.kernels.dispatch import dispatch
from glm_jax.kernels.layer_norm.arguments import Arguments
from glm_jax.kernels.layer_norm.cpu import CPURows
from glm_jax.kernels.layer_norm.reference import Reference

IMPLEMENTATIONS = ("cpu", "reference")


def layer_norm(
    x: Float[Array, "*batch embed"],
    scale: Float[Array, " embed"],
    bias: Float[Array, " embed"],
    epsilon: float,
    implementation: str | None = None,
) -> Float[Array, "*batch embed"]:
    """Compute (x - mean) / sqrt(variance + epsilon) * scale + bias, in float32 within.

    Args:
      implementation: one of `IMPLEMENTATIONS`; None for the fastest that takes the arguments on
        the platform that is compiled for.

    Returns:
      [*batch, embed] in x's dtype.

    Raises:
      BackendError: the named implementation does not take the arguments here.
    """
    arguments = Arguments(x, scale, bias, epsilon)
    return dispatch("layer_norm", (CPURows(), Reference()), arguments, implementation)
