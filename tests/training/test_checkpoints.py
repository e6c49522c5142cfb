"""Checkpoints that are damaged are named, and passed over."""

import errno
import random
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from glm_jax import processes
from glm_jax.checkpoints import checksums
from glm_jax.checkpoints.checksums import DamageError
from glm_jax.config import glm_config
from glm_jax.errors import UserError
from glm_jax.sharding import make_mesh
from glm_jax.training.checkpoints import RunCheckpoints
from glm_jax.training.recipe import Recipe
from glm_jax.training.state import init_state

MODEL = glm_config("tiny", vocab_size=64, hidden_size=16, inner_hidden_size=16, num_heads=2)
RECIPE = Recipe(total_samples=10)
DATA = {"consumed": 12, "streams": {"0": [1, 2]}}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh((1, 1, 1), jax.devices()[:1])


@pytest.fixture(scope="module")
def state(mesh):
    return init_state(MODEL, RECIPE, jax.random.key(0), mesh)


@pytest.fixture(scope="module")
def written(state, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = RunCheckpoints(folder, 1, 0.0, 5, 0)
    for step in (1, 2):
        checkpoints.save(step, state.replace(step=state.step + step), DATA | {"step": step})
    checkpoints.close()
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "checkpoints")


def _restored(folder, mesh, model=MODEL, **options):
    checkpoints = RunCheckpoints(folder, 1, 0.0, 5, 0, **options)
    try:
        return checkpoints.restore_latest(model, RECIPE, mesh)
    finally:
        checkpoints.close()


def _files(folder):
    return [p for item in ("state", "data") for p in sorted((folder / item).rglob("*"))]


def test_a_checkpoint_comes_back(folder, state, mesh):
    restored, data = _restored(folder, mesh)
    assert data == DATA | {"step": 2}
    jax.tree.map(np.testing.assert_array_equal, restored, state.replace(step=state.step + 2))


def test_a_change_at_any_place_of_any_file_is_found(folder, mesh):
    rng = random.Random(0)
    one = shutil.copytree(folder / "2", folder.parent / "one" / "2").parent
    for path in _files(one / "2"):
        if not path.is_file() or not path.stat().st_size:
            continue
        content = path.read_bytes()
        changed = bytearray(content)
        changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        for wrong in (changed, content[:-1], b""):
            path.write_bytes(wrong)
            with pytest.raises(DamageError, match=path.name):
                _restored(one, mesh)
        path.write_bytes(content)
    _restored(one, mesh)


def test_arrays_are_checked_as_they_are_read(state, mesh, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(checksums, "_SMALL_BYTES", -1)
    folder = tmp_path / "checkpoints"
    checkpoints = RunCheckpoints(folder, 1, 0.0, 5, 0)
    checkpoints.save(1, state, DATA)
    checkpoints.close()
    arrays = (p for p in _files(folder / "1") if p.parent.name == "d")
    path = max(arrays, key=lambda p: p.stat().st_size)
    content, rng, found = path.read_bytes(), random.Random(0), 0
    for _ in range(3):
        changed = bytearray(content)
        changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        try:
            restored, _ = _restored(folder, mesh)
        except DamageError:
            found += 1
        else:  # in a node of the index that no other refers to any more
            jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert found >= 2
    assert "Exception ignored" not in capfd.readouterr().err


def test_the_newest_whole_one_goes_on_and_it_is_said(folder, mesh, capsys):
    path = next(p for p in _files(folder / "2") if p.parent.name == "d" and p.stat().st_size > 999)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(DamageError, match=rf"2/.*{path.name} is damaged: it has"):
        _restored(folder, mesh, is_strict=True)
    _, data = _restored(folder, mesh)
    assert data == DATA | {"step": 1}
    said = capsys.readouterr().err
    assert f"{path.name} is damaged" in said
    assert "resuming from step 1" in said
    assert [p.name for p in (folder.parent / "damaged_checkpoints").iterdir()] == ["2"]
    assert sorted(p.name for p in folder.iterdir()) == ["1"]


def test_what_another_process_finds_counts_in_all(folder, mesh, capsys, monkeypatch):
    found = [{"1": (0, "2/state is damaged: a chunk")}, {}, {}]
    monkeypatch.setattr(processes, "gather", lambda own: own | found.pop(0))
    _, data = _restored(folder, mesh)
    assert data == DATA | {"step": 1}
    assert "a chunk; resuming from step 1" in capsys.readouterr().err
    assert sorted(p.name for p in folder.iterdir()) == ["1"]


def test_one_that_another_process_cannot_read_ends_the_run(folder, mesh, monkeypatch):
    found = {"1": (None, "process 1 failed: OSError: no such device")}
    monkeypatch.setattr(processes, "gather", lambda own: own | found)
    with pytest.raises(UserError, match="no such device") as refused:
        _restored(folder, mesh)
    assert not isinstance(refused.value, DamageError)
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2"]


@pytest.mark.parametrize(
    "cause", [OSError(errno.EMFILE, "Too many open files", "d/12"), MemoryError(), OSError("EIO")]
)
def test_what_the_system_refuses_is_no_damage(cause, folder, mesh, monkeypatch):
    def restore(*args, **kwargs):
        try:
            raise cause
        except Exception as error:
            raise Exception("while reading an array") from error

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", restore)
    with pytest.raises(UserError, match=r"Too many open files|out of memory|EIO") as refused:
        _restored(folder, mesh)
    assert not isinstance(refused.value, DamageError)
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2"]


def test_another_model_is_no_damage(folder, mesh):
    with pytest.raises(UserError, match="of another model or recipe") as refused:
        _restored(folder, mesh, MODEL.replace(hidden_size=32))
    assert not isinstance(refused.value, DamageError)
