"""AdamW's update (arXiv:1711.05101) of one parameter and its moments."""

from jaxtyping import Array, Float

from glm_jax.kernels.adamw.arguments import Arguments
from glm_jax.kernels.adamw.cpu import CPUInPlace
from glm_jax.kernels.adamw.reference import Reference
from glm_jax.kernels.dispatch import dispatch_tree

IMPLEMENTATIONS = ("cpu", "reference")

Updated = tuple[
    Float[Array, "*shape"], Float[Array, "*shape"], Float[Array, "*shape"], Float[Array, ""]
]


def adamw(arguments: Arguments, implementation: str | None = None) -> Updated:
    """Take one step against the gradient; where the step is not good, change nothing.

    Args:
      implementation: one of `IMPLEMENTATIONS`; None for the fastest that takes the arguments on
        the platform that is compiled for.

    Returns:
      The parameter and both moments after the step, and the sum of the squares of what a good
      step adds to the parameter.

    Raises:
      BackendError: the named implementation does not take the arguments here.
    """
    backends = CPUInPlace(), Reference()
    updated: Updated = dispatch_tree("adamw", backends, arguments, implementation)
    return updated
