"""GeGLU, the gated linear unit of a feed-forward layer (arXiv:2002.05202)."""

from jaxtyping import Array, Float

from glm_jax.kernels.dispatch import dispatch
from glm_jax.kernels.geglu.arguments import Arguments
from glm_jax.kernels.geglu.cpu import CPURows
from glm_jax.kernels.geglu.reference import Reference

IMPLEMENTATIONS = ("cpu", "reference")


def geglu(
    hidden: Float[Array, "*batch 2 mlp"], implementation: str | None = None
) -> Float[Array, "*batch mlp"]:
    """Compute u * gelu(g) with the exact GELU; g and u are the two halves, u first.

    Args:
      implementation: one of `IMPLEMENTATIONS`; None for the fastest that takes the arguments on
        the platform that is compiled for.

    Returns:
      [*batch, mlp] in the dtype of `hidden`; float32 within.

    Raises:
      BackendError: the named implementation does not take the arguments here.
    """
    return dispatch("geglu", (CPURows(), Reference()), Arguments(hidden), implementation)
