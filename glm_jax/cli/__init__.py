"""What all commands share: parsing flags, set-up, errors as one line, exit statuses."""

import contextlib
import os
import platform
import signal
import sys
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import app, flags, logging

from glm_jax import processes, supervision
from glm_jax.cli import help as cli_help
from glm_jax.cli.experiments import define_experiment_flag, with_default_experiment
from glm_jax.cli.flag_errors import explained, require
from glm_jax.cli.packaged import packaged
from glm_jax.compiler_settings import process_flags
from glm_jax.errors import UserError, shortened, system_refusal

__all__ = [
    "define_experiment_flag",
    "define_process_flags",
    "join_processes",
    "packaged",
    "require",
    "run",
    "run_with_paths",
    "set_up_compiler",
]
_MAX_NUMBER = 2**63 - 1  # of a flag's number
_OUTPUTS = ("output", "workdir")  # flags


def run(main: Callable[[], None]) -> None:
    """Run a command whose input is all by flags, and end the process.

    Errors are one line on stderr. Exit status 2 for wrong flags, 1 for unusable input and errors
    of the operating system, 130 for Ctrl-C; 141, without a line, when the reader of its output is
    gone. Any other error is a bug, and keeps its traceback.
    """
    _run(lambda _: main(), _parse_flags)


def run_with_paths(main: Callable[[list[str]], None], *names: str) -> None:
    """Run a command that takes paths as well as flags; a name such as "[B]" is optional."""
    required = [name for name in names if not name.startswith("[")]

    def parse(argv: list[str]) -> list[str]:
        rest = _parse_known(argv)
        if not len(required) <= len(rest) - 1 <= len(names):
            usage = " ".join(names)
            _fail(f"{len(rest) - 1} paths given, expected {usage} (--help says more)", 2)
        return rest

    _run(lambda argv: main(list(argv[1:])), parse)


def _run(main: Callable[[list[str]], None], parse: Callable[[list[str]], list[str]]) -> None:
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in a script's background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        try:
            app.run(lambda argv: _with_settings(main, argv), flags_parser=parse)
        finally:
            sys.stdout.flush()  # an error here is one to report; at the exit it would be a trace
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # pressed again, it ends at once
        _fail("interrupted", 128 + signal.SIGINT, at_once=True)
    except UserError as error:
        _fail(error, error.status)
    except Exception as error:
        _fail_by_system(error)


def _with_settings(main: Callable[[list[str]], None], argv: list[str]) -> None:
    if not flags.FLAGS["verbosity"].present:
        # Libraries report every file that they touch; --verbosity=0 shows it.
        logging.set_verbosity(logging.WARNING)
        _hide_traces_of_threads()
    set_up_compiler()
    main(argv)


def _hide_traces_of_threads() -> None:
    """Hide errors, such as a full disk, that Orbax's threads print although it raises them."""
    logging.get_absl_logger().addFilter(
        lambda record: record.exc_info is None or "orbax" not in Path(record.pathname).parts
    )
    shown = sys.unraisablehook

    def show(unraisable: Any) -> None:
        # Its pending reads and writes then fail in a closed event loop.
        if str(unraisable.exc_value) != "Event loop is closed":
            shown(unraisable)

    sys.unraisablehook = show


def _fail_by_system(error: Exception) -> NoReturn:
    """End with one line if the cause is outside of the program, else with a traceback."""
    _drop_broken_output()
    if isinstance(error, BrokenPipeError):  # as any command before `| head`
        _leave(128 + signal.SIGPIPE)
    refused = system_refusal(error, _written())
    if refused is not None:
        _fail(refused, status=1)
    is_joined = processes.are_joined()
    if is_joined and isinstance(error, jax.errors.JaxRuntimeError):
        # Usually an interrupted collective.
        _fail(f"{error}; {supervision.ADVICE}", status=1)
    if not is_joined:
        raise error
    traceback.print_exception(error)
    _leave(status=1)


def _written() -> str:
    """Return where a command writes, for an error that names no file."""
    names = [f"--{name}={flags.FLAGS[name].value}" for name in _OUTPUTS if name in flags.FLAGS]
    return " or ".join([*names, "standard output"])


def _drop_broken_output() -> None:
    """Discard buffered standard output that cannot be written: its flush at exit would be a
    traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def set_up_compiler() -> None:
    """Enable jax's cache of compiled programs, and overlap of GPUs' collectives and computation.

    Called before jax is used; settings of the environment win. The cache is in
    JAX_COMPILATION_CACHE_DIR, else in the user's cache folder by kind of processor: a CPU's
    programs run on no other kind.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = home / "glm_jax" / f"programs_{_processor()}"
        jax.config.update("jax_compilation_cache_dir", str(folder))
    os.environ["XLA_FLAGS"] = process_flags(os.environ.get("XLA_FLAGS", ""))


def _processor() -> str:
    """Return a name of the processor's set of instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()}_{zlib.crc32(features.encode()):08x}"


def _parse_flags(argv: list[str]) -> list[str]:
    rest = _parse_known(argv)
    if len(rest) > 1:
        _fail(f"unexpected argument {rest[1]!r}: all input is by flags (--help lists them)", 2)
    return rest


def _parse_known(argv: list[str]) -> list[str]:
    try:
        help_text = cli_help.asked_for(argv[1:])
        if help_text is not None:
            print(help_text, end="", flush=True)
            _leave(status=0)
        rest = list(flags.FLAGS(with_default_experiment(argv)))
        _check_values()
        return rest
    except (flags.Error, ValueError) as error:
        _fail(explained(error), status=2)


def _check_values() -> None:
    """Refuse empty outputs, and numbers such as NaN, which pass a flag's bounds.

    Raises:
      flags.IllegalFlagValueError: a flag has such a value.
    """
    for name in flags.FLAGS:
        value = flags.FLAGS[name].value
        if name in _OUTPUTS and value == "":
            raise flags.IllegalFlagValueError(f"flag --{name}=: expected a path")
        if isinstance(value, int | float) and not abs(value) <= _MAX_NUMBER:
            raise flags.IllegalFlagValueError(
                f"flag --{name}={value}: expected a number from {-_MAX_NUMBER} to {_MAX_NUMBER}"
            )


def _fail(message: object, status: int, at_once: bool = False) -> NoReturn:
    with contextlib.suppress(OSError):  # nobody reads it
        line = shortened(" ".join(str(message).split()))
        print(f"error: {line}", file=sys.stderr, flush=True)
    _leave(status, at_once)


def _leave(status: int, at_once: bool = False) -> NoReturn:
    # A usual exit waits for other processes, which may be gone or wait for this one, and for
    # threads; threads that it does not wait for abort the process if they are compiling.
    if at_once or processes.are_joined():
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def define_process_flags() -> None:
    """Define the flags of a command that several processes can run together."""
    flags.DEFINE_string("coordinator", None, "host:port of process 0, to join several processes")
    flags.DEFINE_integer("num_processes", None, "number of processes", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "index of this process, from 0", lower_bound=0)
    flags.DEFINE_integer(
        "heartbeat_seconds",
        processes.HEARTBEAT_SECONDS,
        "seconds without a heartbeat after which a process counts as lost and the others end",
        lower_bound=1,
    )


def join_processes(may_be_apart: bool = False, saves_at_sigterm: bool = True) -> tuple[int, int]:
    """Join the processes of the flags, or of the scheduler's environment, as a supervised child.

    Args:
      may_be_apart: see `processes.resolve`; such processes have saved each answer.
      saves_at_sigterm: see `processes.join`.

    Returns:
      This process's index and the number of processes; see `processes.resolve`.
    """
    chosen = flags.FLAGS
    coordinator, index, count = processes.resolve(
        chosen.coordinator, chosen.num_processes, chosen.process_id, may_be_apart
    )
    if coordinator is not None:
        supervision.go_on_supervised(f"process {index} of {count}")
        saves = saves_at_sigterm and not may_be_apart
        processes.join(coordinator, index, count, chosen.heartbeat_seconds, saves)
    return index, count
