"""Memory that a training process frees stays with it."""

import json
import subprocess
import sys

import pytest

from glm_jax import allocator

# What a train step does: one large piece, of which each page is written, and returned.
_STEPS = """
import importlib.util, json, resource, sys, types
sys.modules["jax"] = types.SimpleNamespace(config=types.SimpleNamespace(jax_platforms="cpu"))
spec = importlib.util.spec_from_file_location("allocator", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
kept = sys.argv[2] == "keep" and module.keep_freed_memory()
import ctypes, threading
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
size = 100 * 2**20
def step():
    piece = libc.malloc(size)
    ctypes.memset(piece, 1, size)
    libc.free(piece)
def run():
    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    print(json.dumps([kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before]))
thread = threading.Thread(target=run)  # not the first thread, whose arena is another
thread.start()
thread.join()
"""


def _page_faults(mode):
    command = [sys.executable, "-S", "-c", _STEPS, allocator.__file__, mode]
    return json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def test_a_step_that_takes_memory_again_has_no_page_mapped_anew():
    kept, faults = _page_faults("keep")
    if not kept:
        pytest.skip("no glibc")
    assert faults < 100
    assert _page_faults("leave")[1] > 1000  # as it is by default, huge pages or not


@pytest.mark.parametrize(
    ("platforms", "plugins", "expected"),
    [("cpu", ["cuda"], False), ("cuda,cpu", [], True), ("", ["cuda"], True), ("", [], False)],
)
def test_programs_that_may_use_an_accelerator_are_left_alone(
    monkeypatch, platforms, plugins, expected
):
    monkeypatch.setattr(allocator.jax, "config", type("Config", (), {"jax_platforms": platforms}))
    monkeypatch.setattr(allocator.importlib.metadata, "entry_points", lambda group: plugins)
    monkeypatch.setattr(allocator.importlib.util, "find_spec", lambda name: None)
    assert allocator._may_have_accelerator() is expected
