"""Which backend computes an op: the first in order of preference that supports its arguments.

A backend is a callable object. It runs on one platform or on all, and says of given arguments
what keeps it from taking them. All of this happens while a function is traced: what is compiled
holds the chosen backend alone.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
from jaxtyping import Array

from glm_jax.errors import UserError
from glm_jax.kernels import target

Arguments = TypeVar("Arguments", contravariant=True)  # of an op, as one pytree

_PLATFORMS = ("cpu", "cuda", "tpu")


class BackendError(UserError):
    """A backend was asked for by name that cannot compute the op here."""


@runtime_checkable
class Backend(Protocol[Arguments]):
    """One way to compute an op.

    Attributes:
      name: what a caller asks for it by; several backends may share one, such as two kernels of
        one library for different shapes.
      platform: "cpu", "cuda" or "tpu"; None where it runs on all.
    """

    @property
    def name(self) -> str: ...

    @property
    def platform(self) -> str | None: ...

    def supports(self, arguments: Arguments) -> str | None:
        """Return None where the backend takes the arguments, else the reason why it does not."""

    def __call__(self, arguments: Arguments) -> Array: ...


@dataclasses.dataclass(frozen=True)
class PlainFormula:
    """Base of an op's reference, which takes everything on every platform."""

    name: str = "reference"
    platform: None = None

    def supports(self, arguments: Any) -> None:
        """Take everything."""


def dispatch(
    op: str,
    backends: Sequence[Backend[Arguments]],
    arguments: Arguments,
    implementation: str | None = None,
) -> Array:
    """Compute an op by the first backend that supports the arguments on the target platform.

    Args:
      op: the op's name, for the error's message.
      backends: in order of preference; without `implementation`, the last one takes everything.
      arguments: a pytree of arrays and static fields, in the form that the op's backends take.
      implementation: name of the backend to use; None for the preferred one.

    Raises:
      BackendError: no backend of the name `implementation` supports the arguments on the
        platform that the program is compiled for.
    """
    if implementation is not None:
        return _named(op, backends, arguments, implementation)(arguments)
    supporting = [backend for backend in backends if backend.supports(arguments) is None]
    first = lambda platform: next(b for b in supporting if b.platform in (platform, None))
    default = first(None)
    chosen = {platform: first(platform) for platform in _PLATFORMS}
    special = {platform: backend for platform, backend in chosen.items() if backend is not default}
    if not special:
        return default(arguments)
    # Only lowering knows for certain where a program will run, and drops the other branches.
    computed: Array = jax.lax.platform_dependent(arguments, default=default, **special)
    return computed


def unmet(*requirements: tuple[bool, str]) -> str | None:
    """Return what a backend takes, by the first of its requirements that is not met.

    Args:
      requirements: whether each is met, and what it is, such as "one range of keys a row".
    """
    return next((f"it takes {what}" for is_met, what in requirements if not is_met), None)


def _named(op: str, backends: Sequence[Any], arguments: Any, name: str) -> Any:
    platform = target.platform()
    named = [backend for backend in backends if backend.name == name]
    if not named:
        names = ", ".join(dict.fromkeys(backend.name for backend in backends))
        raise BackendError(f"{op}: no backend is called {name!r}; expected one of {names}")
    reasons = []
    for backend in named:
        if backend.platform not in (platform, None):
            reason: str | None = f"it runs on {backend.platform}, and this is {platform}"
        else:
            reason = backend.supports(arguments)
        if reason is None:
            return backend
        reasons.append(reason)
    raise BackendError(
        f"{op}: the backend {name!r} cannot be used here: {'; '.join(dict.fromkeys(reasons))}"
    )
