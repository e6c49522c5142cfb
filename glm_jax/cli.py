"""What every command line here has in common: how it starts and how it says no."""

import sys
from collections.abc import Callable
from typing import NoReturn

from absl import app, flags, logging

from glm_jax import processes
from glm_jax.errors import UserError


def run(main: Callable[[], None]) -> None:
    """Runs a command-line tool whose input is all by flags.

    Exit status 2 for wrong flags, 1 for input that cannot be used; either is one line on
    stderr.
    """
    app.run(lambda _: _guarded(main), flags_parser=_parse_flags)


def run_with_paths(main: Callable[[list[str]], None], *names: str) -> None:
    """`run` for a tool that takes as many paths as `names` says, besides flags."""

    def parse(argv: list[str]) -> list[str]:
        rest = _parse_known(argv)
        if len(rest) - 1 != len(names):
            _fail(f"{len(rest) - 1} paths given: {' '.join(names)} are due", 2)
        return rest

    app.run(lambda argv: _guarded(lambda: main(list(argv[1:]))), flags_parser=parse)


def _guarded(main: Callable[[], None]) -> None:
    if not flags.FLAGS["verbosity"].present:
        # Libraries report every file that they touch; --verbosity=0 shows it.
        logging.set_verbosity(logging.WARNING)
    try:
        main()
    except UserError as error:
        _fail(error, status=1)


def _parse_flags(argv: list[str]) -> list[str]:
    rest = _parse_known(argv)
    if len(rest) > 1:
        _fail(f"unexpected argument {rest[1]!r}: all input is by flags (--help lists them)", 2)
    return rest


def _parse_known(argv: list[str]) -> list[str]:
    try:
        return list(flags.FLAGS(argv))
    except (flags.Error, ValueError, AttributeError, KeyError, OSError) as error:
        _fail(error, status=2)


def _fail(message: object, status: int) -> NoReturn:
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(status)


def define_process_flags() -> None:
    """Flags of a launcher that several processes can run together."""
    flags.DEFINE_string("coordinator", None, "host:port of process 0, of several processes")
    flags.DEFINE_integer("num_processes", None, "how many there are", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "which of them this is, from 0", lower_bound=0)


def join_processes(may_be_apart: bool = False) -> tuple[int, int]:
    """Joins the processes that the flags, or the scheduler's environment, speak of.

    Returns:
      This process's number, and how many there are; see `processes.initialize`.
    """
    chosen = flags.FLAGS
    return processes.initialize(
        chosen.coordinator, chosen.num_processes, chosen.process_id, may_be_apart
    )
