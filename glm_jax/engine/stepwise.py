"""Work that is done a step at a time, so that other work can go on between."""

from collections.abc import Callable, Generator
from typing import TypeVar

_Result = TypeVar("_Result")

# Between steps comes None, or what compiles the next one's program: called, from any thread, before
# going on, or else left to that step.
Steps = Generator[Callable[[], object] | None, None, _Result]


def finish(steps: Steps[_Result]) -> _Result:
    """The result of all steps, done at once."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: _Result = end.value
            return result
