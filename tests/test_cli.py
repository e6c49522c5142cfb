"""How command lines end: what is no bug is one line and a status, a bug keeps its trace."""

import errno
import importlib
import logging as std_logging
import os
import signal
import sys
import types

import pytest
from absl import flags, logging

import convert
import launch
from glm_jax import cli
from glm_jax.errors import UserError


@pytest.fixture(autouse=True)
def _same_handler():
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def _ends_by(error, monkeypatch):
    def run(*_, **__):
        raise error

    monkeypatch.setattr(cli.app, "run", run)
    monkeypatch.setattr(cli, "_OUTPUTS", ())  # flags of launchers that other tests imported
    monkeypatch.setattr(cli.os, "_exit", sys.exit)
    cli.run(lambda: None)


def _system_error(number, *paths):
    return OSError(number, os.strerror(number), *paths)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, ""),
        (UserError("two\nlines"), 1, "error: two lines\n"),
        (UserError("a" * 9999 + "b"), 1, f"error: {'a' * 1000} ... {'a' * 999}b\n"),
        (_system_error(errno.EACCES, "x/y"), 1, "error: x/y: Permission denied\n"),
        (_system_error(errno.ENOTDIR, "x/y"), 1, "error: x/y: Not a directory\n"),
        (_system_error(errno.ENOENT, "x"), 1, "error: x: No such file or directory\n"),
        (_system_error(errno.ENOSPC), 1, "error: standard output: No space left on device\n"),
        (ValueError("tensorstore: Permission denied [a/b]"), 1, "Permission denied [a/b]\n"),
        (RuntimeError("RESOURCE_EXHAUSTED: 9 TB"), 1, "error: out of memory: RESOURCE_EXH"),
        (MemoryError(), 1, "error: out of memory: MemoryError\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_what_is_no_bug_is_a_line_and_a_status(error, status, line, monkeypatch, capsys):
    with pytest.raises(SystemExit) as raised:
        _ends_by(error, monkeypatch)
    assert raised.value.code == status
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == bool(line)


def test_an_error_may_have_a_status_of_its_own(monkeypatch):
    error = UserError("stopped")
    error.status = 143
    with pytest.raises(SystemExit) as raised:
        _ends_by(error, monkeypatch)
    assert raised.value.code == 143


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), KeyError("a"), ValueError("x")])
def test_a_bug_keeps_its_trace(error, monkeypatch):
    with pytest.raises(type(error)) as raised:
        _ends_by(error, monkeypatch)
    assert raised.value is error


@pytest.mark.parametrize("package", [launch, convert])
def test_ctrl_c_while_a_command_line_imports_is_no_trace(package, monkeypatch):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    importlib.reload(package)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # of an import alone
    monkeypatch.setattr(sys, "argv", ["-m"])
    importlib.reload(package)
    ended = []
    monkeypatch.setattr(package.os, "_exit", ended.append)
    monkeypatch.setattr(package.os, "write", lambda *given: ended.append(given))
    signal.raise_signal(signal.SIGINT)
    assert ended == [(2, b"error: interrupted\n"), 130]


def test_traces_of_orbaxs_threads_are_hidden(monkeypatch):
    """Its errors are raised as well; those of others are shown."""
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    absl_logger = logging.get_absl_logger()
    monkeypatch.setattr(absl_logger, "filters", [])
    cli._hide_traces_of_threads()
    for text in ("Event loop is closed", "another"):
        sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError(text)))
    assert [str(unraisable.exc_value) for unraisable in shown] == ["another"]
    for path, trace, is_shown in (
        ("/x/orbax/y.py", (ValueError, ValueError(), None), False),
        ("/x/orbax/y.py", None, True),
        ("/x/orbaxes.py", (ValueError, ValueError(), None), True),
    ):
        record = std_logging.LogRecord("absl", 40, path, 1, "failed", (), trace)
        assert bool(absl_logger.filter(record)) == is_shown


def test_an_output_without_a_name_is_refused(monkeypatch, capsys):
    chosen = flags.FlagValues()
    flags.DEFINE_string("output", None, "a folder", flag_values=chosen)
    monkeypatch.setattr(flags, "FLAGS", chosen)
    with pytest.raises(SystemExit) as ended:
        cli._parse_known(["it", "--output="])
    assert ended.value.code == 2
    assert "--output=: expected a path" in capsys.readouterr().err
