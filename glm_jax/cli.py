"""What every command line here has in common: how it starts and how it says no."""

import os
import platform
import sys
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import jax
from absl import app, flags, logging

from glm_jax import processes, supervision
from glm_jax.errors import UserError

_OVERLAP = "xla_gpu_enable_latency_hiding_scheduler"


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
    set_up_compiler()
    try:
        main()
    except UserError as error:
        _fail(error, status=1)
    except Exception as error:
        if not processes.are_joined():
            raise
        if isinstance(error, jax.errors.JaxRuntimeError):  # an exchange that broke off, mostly
            _fail(f"{error}; {supervision.ADVICE}", status=1)
        traceback.print_exc()
        _leave(status=1)


def set_up_compiler() -> None:
    """Keeps compiled programs for the next start, and lets GPUs copy and exchange while they
    compute. Before jax is used; what the environment says already stays.

    Programs lie in JAX_COMPILATION_CACHE_DIR, or else in the user's cache folder, by kind of
    processor: those for a CPU run on no other kind.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = home / "glm_jax" / f"programs_{_processor()}"
        jax.config.update("jax_compilation_cache_dir", str(folder))
    given = os.environ.get("XLA_FLAGS", "")
    if _OVERLAP not in given:
        os.environ["XLA_FLAGS"] = f"{given} --{_OVERLAP}=true".strip()


def _processor() -> str:
    """A name for what a processor can do."""
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
        return list(flags.FLAGS(argv))
    except (flags.Error, ValueError, AttributeError, KeyError, OSError) as error:
        _fail(error, status=2)


def _fail(message: object, status: int) -> NoReturn:
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    _leave(status)


def _leave(status: int) -> NoReturn:
    if processes.are_joined():
        # Leaving as usual waits for the others, which may be gone or wait for this one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def define_process_flags() -> None:
    """Flags of a launcher that several processes can run together."""
    flags.DEFINE_string("coordinator", None, "host:port of process 0, of several processes")
    flags.DEFINE_integer("num_processes", None, "how many there are", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "which of them this is, from 0", lower_bound=0)
    flags.DEFINE_integer(
        "heartbeat_seconds",
        processes.HEARTBEAT_SECONDS,
        "a process that gave no sign of life for so long counts as gone, and the others end",
        lower_bound=1,
    )


def join_processes(may_be_apart: bool = False) -> tuple[int, int]:
    """Joins the processes that the flags, or the scheduler's environment, speak of; this one
    goes on as a supervised child.

    Returns:
      This process's number, and how many there are; see `processes.place`.
    """
    chosen = flags.FLAGS
    coordinator, number, count = processes.place(
        chosen.coordinator, chosen.num_processes, chosen.process_id, may_be_apart
    )
    if coordinator is not None:
        supervision.go_on_supervised(f"process {number} of {count}")
        processes.join(coordinator, number, count, chosen.heartbeat_seconds)
    return number, count
