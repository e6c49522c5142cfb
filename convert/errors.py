"""How a converter says that its input is wrong."""

from glm_jax.errors import UserError


class ConvertError(UserError):
    """Input that cannot be converted."""


class SourceError(ConvertError):
    """Input that cannot be read this time, for whatever reason its disk or network has; what was
    converted of it stays."""
