"""Errors of the converters' input."""

from glm_jax.errors import UserError


class ConvertError(UserError):
    """Input that cannot be converted."""


class SourceError(ConvertError):
    """Input whose disk or network fails now, so that the same command can go on later."""
