"""`make test-gpu`: the tests marked `gpu` on the first device there is, CPU beside it.

A plugin of pytest, with the packages of whatever environment it is started in. What needs a
package that is missing there, or more devices, is left out, and the reason is printed.
GLM_JAX_TEST_PLATFORMS=cpu tries the selection where there is no GPU.
"""

import contextlib
import faulthandler
import fcntl
import importlib.util
import os
import shutil
import tempfile
import urllib.parse

PLATFORMS = os.environ.setdefault("GLM_JAX_TEST_PLATFORMS", "cuda,cpu")
os.environ["JAX_PLATFORMS"] = PLATFORMS
# Several processes may share the device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

# What glm_jax takes, and an environment made for something else may lack.
PACKAGES = (
    "array_record", "beartype", "grain", "httpx2", "matplotlib", "ml_collections", "orbax",
    "pyarrow", "sentencepiece", "tensorboardX", "tensorstore", "tokamax", "torch", "tqdm", "yaml",
    "zstandard",
)  # fmt: skip
# Of a test, after which its process is ended: a kernel may never end.
SECONDS = 1200 if PLATFORMS == "cpu" else 120
# Of all processes of a run: a locked file while a test runs, named by test and process.
_IS_FIRST = "GLM_JAX_TESTS_RUNNING" not in os.environ
if _IS_FIRST:
    os.environ["GLM_JAX_TESTS_RUNNING"] = tempfile.mkdtemp(prefix="glm_jax_tests_")
_RUNNING = Path(os.environ["GLM_JAX_TESTS_RUNNING"])


def _missing() -> list[str]:
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


_STDERR = os.dup(2)


def pytest_configure(config: pytest.Config) -> None:
    try:
        found = jax.default_backend()
    except RuntimeError as error:
        found = str(error).splitlines()[0]
    if found != "gpu" and PLATFORMS != "cpu":
        pytest.exit(f"make test-gpu needs a GPU that JAX can use, found: {found}", returncode=1)


def pytest_unconfigure() -> None:
    if _IS_FIRST:
        shutil.rmtree(_RUNNING, ignore_errors=True)


def pytest_terminal_summary(terminalreporter) -> None:
    device = jax.devices()[0]
    write = terminalreporter.write_line
    write(f"on {device.device_kind} ({device.platform}), JAX {jax.__version__}")
    if missing := _missing():
        write(f"not installed, so that what needs them is left out: {', '.join(missing)}")


def _reason_to_leave_out(error: BaseException | None) -> str | None:
    """Of a missing package, or of devices; None where a test failed."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError):
            name = str(error.name).split(".")[0]
            return f"needs {name}, which is not installed" if name in PACKAGES else None
        if type(error).__name__ == "MeshError" and "devices, there are" in str(error):
            return str(error)
        error = error.__cause__ or error.__context__
    return None


def _leaving_out() -> Iterator[None]:
    try:
        return (yield)
    except Exception as error:
        reason = _reason_to_leave_out(error)
        if reason is None:
            raise
        pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    name = f"{os.getpid()} {_function(item)}"
    with (_RUNNING / f"new {name}").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until this process ends
        note = (_RUNNING / f"new {name}").rename(_RUNNING / name)
        faulthandler.dump_traceback_later(SECONDS, exit=True, file=_STDERR)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()
            note.unlink()


def _function(item: pytest.Item) -> str:
    """A test's name without its parameters, as a file's."""
    return urllib.parse.quote(item.nodeid.partition("[")[0], safe="")


def _has_ended_a_process(item: pytest.Item) -> bool:
    """Whether the same function with other parameters did."""
    for note in _RUNNING.glob(f"[0-9]* {_function(item)}"):
        with contextlib.suppress(OSError), note.open() as file:  # locked, or just removed
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    return False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    if _has_ended_a_process(item):
        pytest.fail("with other parameters it ended its process, or did not end in time", False)
    return (yield from _leaving_out())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    return (yield from _leaving_out())


class _Module(pytest.Module):
    """A file of tests, left out whole where it needs a missing package."""

    def _getobj(self) -> object:
        try:
            return super()._getobj()
        except self.CollectError as error:
            reason = _reason_to_leave_out(error)
            if reason is None:
                raise
            pytest.skip(reason, allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent) -> pytest.Module:
    return _Module.from_parent(parent, path=module_path)
