"""Command lines by the dozen: each in a fork of a process that has imported what takes long.

Run as a program it reads lines of JSON on stdin, each a list of `Try`s' fields, and answers each
with a line, a list of [status, stdout, stderr].
"""

import contextlib
import ctypes
import functools
import importlib
import json
import os
import pkgutil
import resource
import runpy
import signal
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
_LIBRARIES = ("conversion", "merging", "model_readers", "sat_writer")
_CAPABILITIES = 0x20080522  # the version of capset's structures
_OVERRIDE = (1 << 1) | (1 << 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


@dataclass(frozen=True)
class Try:
    """A command line, without the interpreter: module, or path of a file, and arguments; of
    "shell" one argument, for that.

    Attributes:
      is_full: no file can be written, as where a disk is full.
      is_parsed_only: instead of running it, its flags are parsed; the answer's stdout is their
        names, but those of libraries.
      seconds: after which it is killed, for it hangs.
      bad_numbers: instead of running it, each of its flags that is a number is parsed as each of
        these; the answer's stdout is {"--flag=text": status}.
    """

    command: tuple[str, ...]
    cwd: str
    is_full: bool = False
    is_parsed_only: bool = False
    seconds: int = 300
    bad_numbers: tuple[str, ...] = ()


def run_all(tries, environment):
    """[(status, stdout, stderr)] of each."""
    program = _program(tuple(sorted(environment.items())))
    program.stdin.write(json.dumps([asdict(t) for t in tries]) + "\n")
    program.stdin.flush()
    answer = program.stdout.readline()
    assert answer, program.wait()
    return json.loads(answer)


@functools.cache
def _program(environment):
    """This file as a program, which ends when its stdin does: when this process ends."""
    return subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # OpenBLAS's threads would not outlive a fork.
        env=dict(environment) | {"OPENBLAS_NUM_THREADS": "1"},
        text=True,
    )


def _import_libraries():
    import glm_jax

    for module in pkgutil.walk_packages(glm_jax.__path__, "glm_jax."):
        with contextlib.suppress(ImportError):  # what is not installed
            importlib.import_module(module.name)
    for name in _LIBRARIES:
        importlib.import_module(f"convert.{name}")


def _obey_permissions():
    """Takes from root that it may read and write whatever it likes."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES, 0)
    data = (ctypes.c_uint32 * 6)()
    libc.capget(header, data)
    for i in (0, 1):  # effective, permitted
        data[i] &= ~_OVERRIDE
    assert libc.capset(header, data) == 0


def _begin(tried):
    """A child that runs it: its number, and the ends of pipes that it writes to."""
    pipes = os.pipe(), os.pipe()
    with warnings.catch_warnings(action="ignore"):
        child = os.fork()
    if child:
        for _, writer in pipes:
            os.close(writer)
        return child, [reader for reader, _ in pipes]
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = os.fdopen(0, encoding="utf-8")  # none of what the parent has read
    for number, (reader, writer) in enumerate(pipes, 1):
        os.close(reader)
        os.dup2(writer, number)
    status = 70
    try:
        signal.alarm(tried["seconds"])
        _obey_permissions()
        if tried["is_full"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        os.chdir(tried["cwd"])
        status = _run(tried["command"], tried["bad_numbers"], tried["is_parsed_only"])
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _run(command, bad_numbers, is_parsed_only):
    sys.argv = list(command)
    if bad_numbers or is_parsed_only:
        from absl import flags

        from glm_jax import cli

        of_libraries = set(flags.FLAGS)
        answer = lambda *_: _answer_parsing(command[1:], bad_numbers, of_libraries)
        cli.run = cli.run_with_paths = answer
    if command[0] == "shell":
        return subprocess.run(command[1], shell=True, check=False).returncode
    run = runpy.run_path if command[0].endswith(".py") else runpy.run_module
    more = {} if run is runpy.run_path else {"alter_sys": True}
    try:
        run(command[0], run_name="__main__", **more)
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
            return 1
        return error.code or 0
    return 0


def _answer_parsing(arguments, bad_numbers, of_libraries):
    from absl import flags

    from glm_jax import cli

    if bad_numbers:
        print(json.dumps(_statuses(arguments, bad_numbers, of_libraries)))
        return
    print(json.dumps(sorted(set(flags.FLAGS) - of_libraries)))
    cli._parse_known(list(sys.argv))


def _statuses(arguments, bad_numbers, of_libraries):
    from absl import flags

    from glm_jax import cli

    ours = (flags.FLAGS[name] for name in set(flags.FLAGS) - of_libraries)
    numbers = sorted(flag.name for flag in ours if flag.flag_type() in ("int", "float"))
    statuses = {}
    for given in [f"--{name}={text}" for name in numbers for text in bad_numbers]:
        for name in flags.FLAGS:
            flags.FLAGS[name].unparse()
        try:
            cli._parse_known(["it", *arguments, given])
            statuses[given] = 0
        except SystemExit as error:
            statuses[given] = error.code
    return statuses


def _finish(child, readers):
    texts = []
    for reader in readers:
        with open(reader, encoding="utf-8", errors="replace") as stream:
            texts.append(stream.read())
    _, raw = os.waitpid(child, 0)
    return [os.waitstatus_to_exitcode(raw), *texts]


def main():
    _import_libraries()
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose the other threads"
    for line in sys.stdin:
        print(json.dumps([_finish(*_begin(tried)) for tried in json.loads(line)]), flush=True)


if __name__ == "__main__":
    main()
