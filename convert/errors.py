"""How a converter says that its input is wrong."""

from glm_jax.errors import UserError


class ConvertError(UserError):
    """Input that cannot be converted."""
