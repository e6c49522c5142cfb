"""Work that is done a step at a time, so that other work can go on between."""

import functools
from collections.abc import Callable, Generator
from typing import Any, ParamSpec, TypeVar

_Result = TypeVar("_Result")
_Arguments = ParamSpec("_Arguments")

# Between steps comes None, or what compiles the next one's program: called, from any thread, before
# going on, or else left to that step.
Steps = Generator[Callable[[], object] | None, None, _Result]


def finish(steps: Steps[_Result]) -> _Result:
    """Return the result of all steps, done at once."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: _Result = end.value
            return result


def replayable(
    function: Callable[_Arguments, Steps[_Result]],
) -> Callable[_Arguments, Steps[_Result]]:
    """Decorate a generator function, so that its steps can be pickled before the first of them.

    A copy begins anew with the arguments, as in another process that runs the same model.
    """

    @functools.wraps(function)
    def begin(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Steps[_Result]:
        return _Replayable(begin, function(*args, **kwargs), args, kwargs)

    return begin


class _Replayable(Generator[Any, None, _Result]):
    """The steps of a generator, which know how they were begun."""

    def __init__(
        self, begin: Callable[..., Any], steps: Steps[_Result], args: Any, kwargs: dict[str, Any]
    ):
        self._begin, self._steps, self._args, self._kwargs = begin, steps, args, kwargs
        self._has_begun = False

    def send(self, value: None) -> Any:
        self._has_begun = True
        return self._steps.send(value)

    def throw(self, *error: Any) -> Any:
        return self._steps.throw(*error)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._has_begun:
            raise TypeError("steps that have begun cannot be pickled")
        return functools.partial(self._begin, **self._kwargs), self._args
