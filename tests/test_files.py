"""Output is whole or not there."""

import errno
import fcntl
import os
import shutil
from pathlib import Path

import pytest

from glm_jax import files
from glm_jax.files import LockedError, OutputError
from glm_jax.jobs import record_store
from glm_jax.tokenizer import TokenizerConfig, save_tokenizer


def _write_folder(path):
    with files.whole_folder(path) as partial:
        (partial / "inside").mkdir()
        (partial / "inside" / "values").write_bytes(b"1")


_WRITERS = {
    "write_text": (lambda folder: files.write_text(folder / "a.json", "{}"), {"a.json"}),
    "whole_folder": (lambda folder: _write_folder(folder / "model"), {"model", "values", "inside"}),
    "save_tokenizer": (
        lambda folder: save_tokenizer(folder, b"model", TokenizerConfig()),
        {"tokenizer.model", "tokenizer_config.json"},
    ),
    "claim": (lambda folder: record_store.claim(folder, {"input": {}}), {"job.json"}),
}


@pytest.mark.parametrize("name", _WRITERS)
def test_what_is_renamed_is_on_the_disk_and_then_its_name(name, tmp_path, monkeypatch):
    write, expected = _WRITERS[name]
    events = []
    paths = {}
    real_open, real_sync, real_rename = os.open, os.fsync, Path.rename

    def opened(path, *more, **options):
        descriptor = real_open(path, *more, **options)
        paths[descriptor] = str(path)
        return descriptor

    def synced(descriptor):
        events.append(("sync", Path(paths[descriptor])))
        real_sync(descriptor)

    def renamed(source, target):
        inside = [path.relative_to(source) for path in source.rglob("*")]
        unsynced = {source, *(source / path for path in inside)}
        assert unsynced <= {path for kind, path in events if kind == "sync"}
        events.append(("rename", target))
        return real_rename(source, target)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    write(tmp_path)
    for number, (kind, path) in enumerate(events):
        if kind == "rename":
            assert ("sync", path.parent) in events[number:]
    assert {path.name for path in tmp_path.rglob("*")} == expected


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG])
def test_a_disk_that_takes_no_more_leaves_what_was_there(number, tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    path.write_text("before")

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OutputError, match=f"results.json cannot be written: {os.strerror(number)}"):
        files.write_text(path, "after")
    assert path.read_text() == "before"
    with pytest.raises(OutputError, match="cannot be written"):
        _write_folder(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_an_output_below_a_file_or_in_place_of_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="file is a file"):
        files.write_text(tmp_path / "file" / "results.json", "")
    with pytest.raises(OutputError, match="Is a directory"):
        files.write_text(tmp_path / "folder", "")
    with pytest.raises(OutputError, match="is not empty"):
        _write_folder(tmp_path / "file")
    with pytest.raises(OutputError, match="file is a file"):
        _write_folder(tmp_path / "file" / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_an_error_of_something_else_is_not_the_outputs(tmp_path):
    with pytest.raises(FileNotFoundError), files.replacing(tmp_path / "a"):
        (tmp_path / "nowhere").read_text()
    assert not list(tmp_path.iterdir())


def test_two_writers_of_one_output(tmp_path):
    output = tmp_path / "out"
    with files.locked(output):
        with pytest.raises(LockedError, match=rf"process {os.getpid()} on .* since 20\d\d-"):
            _write_folder(output)
        with pytest.raises(LockedError), files.locked(output, 1, 2):
            pass
    with files.locked(output, 0, 2), files.locked(output, 1, 2):
        for others in ((0, 2), (0, 1), (1, 3)):
            with pytest.raises(LockedError, match="by process"), files.locked(output, *others):
                pass
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_named_by_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk/out")
    with files.locked(tmp_path / "disk" / "out"), pytest.raises(LockedError):
        _write_folder(tmp_path / "out")
    for is_there in (False, True):
        if is_there:
            shutil.rmtree(tmp_path / "disk" / "out")
            (tmp_path / "disk" / "out").mkdir()
        _write_folder(tmp_path / "out")
        assert list((tmp_path / "disk" / "out").iterdir())
        assert (tmp_path / "out").is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["out"]


@pytest.mark.parametrize("to", ["nowhere/out", "out"])
def test_a_link_to_nothing_is_called_that(tmp_path, to):
    (tmp_path / "out").symlink_to(to)
    with (
        pytest.raises(OutputError, match=f"out is a link to {to}, which"),
        files.locked(tmp_path / "out"),
    ):
        pass


def test_no_device_and_no_link_makes_way_for_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="is not a regular file"):
        files.write_text(tmp_path / "pipe", "text")
    (tmp_path / "link").symlink_to("file")
    files.write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "text"


def test_a_lock_in_a_folder_leaves_it_empty(tmp_path):
    with files.locked(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / ".out.lock").touch()
        files.refuse_non_empty(tmp_path / "out")
        (tmp_path / "out" / "a").touch()
        with pytest.raises(OutputError, match="is not empty"):
            files.refuse_non_empty(tmp_path / "out")


def test_a_dead_holder_leaves_the_lock_open(tmp_path):
    (tmp_path / ".out.lock").write_text("process 1 on another host since yesterday")
    _write_folder(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with files.locked(tmp_path / "out"):
        assert "no locks on this file system" in capsys.readouterr().err
