"""What converters and exporters are told to write to, and what they read that they wrote."""

import errno
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import GOLDEN, POSITIONS, load_golden

from convert import orbax_to_safetensors
from convert.byte_source import FileBytes
from convert.conversion import Options, convert_shards
from convert.errors import ConvertError, SourceError
from convert.inspect import describe
from convert.merging import write_merged
from convert.model_readers import open_model, open_plainly
from convert.sat_writer import write_shards
from convert.verify import check
from glm_jax import restore
from glm_jax.checkpoints import checksums, parameter_files
from glm_jax.checkpoints.adapter_folder import model_identity, save_adapter
from glm_jax.checkpoints.model_folder import load_config
from glm_jax.errors import UserError
from glm_jax.files import OutputError
from glm_jax.model import adapters
from glm_jax.model.params import init_of

SHARDS = GOLDEN / "checkpoints" / "tp2"
OPTIONS = Options(max_sequence_length=POSITIONS)
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model folder, its export, and adapters of it."""
    folder = tmp_path_factory.mktemp("made")
    convert_shards(SHARDS, folder / "model", OPTIONS)
    orbax_to_safetensors.export(folder / "model", folder / "safetensors", 100_000)
    adapter = adapters.AdapterConfig(rank=2, alpha=2.0, targets=("dense",))
    config = load_config(folder / "model")
    pairs = init_of(adapters.specs(config, adapter), jax.random.key(0), None)
    save_adapter(folder / "adapter", adapter, pairs, model_identity(folder / "model", config))
    return folder


TOOLS = {
    "sat_to_orbax": lambda made, output: convert_shards(SHARDS, output, OPTIONS),
    "orbax_to_sat": lambda made, output: write_shards(made / "model", output, 2),
    "orbax_to_safetensors": lambda made, output: orbax_to_safetensors.export(
        made / "model", output, 10**9
    ),
    "merge_adapter": lambda made, output: write_merged(made / "model", made / "adapter", output),
}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("place", ["file", "file/below", "full", "read-only", "n" * 300])
def test_an_output_that_cannot_be_written_is_one_line(made, tmp_path, monkeypatch, tool, place):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    if place == "read-only":  # to whoever runs this, root too
        make = os.mkdir

        def refuse(path, *rest, **more):
            if "read-only" in str(path):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            make(path, *rest, **more)

        monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(OutputError, match=r"^output [^\n]*$"):
        TOOLS[tool](made, tmp_path / place)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "full", "mine"]
    with monkeypatch.context() as patched:
        patched.chdir(tmp_path)  # a path that is not absolute
        with pytest.raises(OutputError, match=r"^output [^\n]*$"):
            TOOLS[tool](made, Path(place if place != "read-only" else "file/read-only"))
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "mine").read_text() == "mine"


def test_a_conversion_that_cannot_begin_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match="No space left"):
        convert_shards(SHARDS, tmp_path / "out", OPTIONS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tool", ["orbax_to_sat", "orbax_to_safetensors", "merge_adapter"])
def test_a_disk_that_fills_up_leaves_nothing_half_written(made, tmp_path, monkeypatch, tool):
    def full(*_, **__):
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    def full_file(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(orbax_to_safetensors, "save_file", full)
    monkeypatch.setattr(parameter_files, "write_part", full)
    monkeypatch.setattr("convert.torch_writer.TorchWriter.write", full_file)
    with pytest.raises(OutputError, match=r"disk is full|No space left"):
        TOOLS[tool](made, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_in_a_conversion_is_seen_before_orbax_sees_it(tmp_path, monkeypatch):
    """Whose threads would each print a trace."""
    usage = shutil.disk_usage(tmp_path)
    answers = iter([usage, usage, usage._replace(free=1 << 20)])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: next(answers))
    with pytest.raises(ConvertError, match=r"MiB are free of .*what is converted stays"):
        convert_shards(SHARDS, tmp_path / "out", OPTIONS)
    monkeypatch.undo()
    left = [p.name for p in (tmp_path / "out.partial" / "params").iterdir()]
    assert left == [parameter_files.EMBEDDING]
    convert_shards(SHARDS, tmp_path / "out", OPTIONS)
    assert check(open_model(tmp_path / "out")) == 39


def test_a_source_that_cannot_be_read_this_time_costs_nothing(tmp_path, monkeypatch):
    """The disk or network it lies on fails: what is converted stays, and is gone on with."""
    read, count = FileBytes._read_part, [0]

    def failing(self, offset, buffer):
        count[0] += len(buffer) > 4000
        if count[0] == 12:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(self, offset, buffer)

    monkeypatch.setattr(FileBytes, "_read_part", failing)
    with pytest.raises(SourceError, match=r"mp_rank_0\d.* cannot be read at byte .* Input/output"):
        convert_shards(SHARDS, tmp_path / "out", OPTIONS)
    assert (tmp_path / "out.partial" / "params" / parameter_files.EMBEDDING).is_dir()
    monkeypatch.undo()
    convert_shards(SHARDS, tmp_path / "out", OPTIONS)
    expected = load_golden("tp2", "float16")[1]
    jax.tree.map(np.testing.assert_array_equal, restore(tmp_path / "out")[1], expected)


@pytest.mark.parametrize(
    "name",
    ["../escaped", "/tmp/escaped", "a/b", "..", ".", "", "latest", ".hidden", "a\nb", "n" * 300],
)
def test_an_iteration_is_a_name_and_never_a_path(made, tmp_path, name):
    with pytest.raises(ConvertError, match=r"--iteration=.*a name of letters"):
        write_shards(made / "model", tmp_path / "out", 1, name)
    assert not list(tmp_path.iterdir())


def test_an_iteration_of_another_name(made, tmp_path):
    write_shards(made / "model", tmp_path / "out", 1, "step_12.5")
    assert (tmp_path / "out" / "step_12.5" / "mp_rank_00_model_states.pt").exists()
    assert open_model(tmp_path / "out").config.num_layers == 3


def _edit(change):
    def edit(folder):
        index = json.loads((folder / INDEX).read_text())
        change(index)
        (folder / INDEX).write_text(json.dumps(index))

    return edit


def _set_config(**fields):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return edit


def _flip(folder):
    data = bytearray((folder / "model-00002-of-00005.safetensors").read_bytes())
    data[-100] ^= 1
    (folder / "model-00002-of-00005.safetensors").write_bytes(bytes(data))


def _rename_all(to):
    return _edit(lambda index: index.update(weight_map=dict.fromkeys(index["weight_map"], to)))


_FILE = "model-00002-of-00005.safetensors"
_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_flip, f"{_FILE} is damaged"),
        (lambda f: (f / _FILE).write_bytes((f / _FILE).read_bytes()[:-1]), f"{_FILE} is damaged"),
        (lambda f: (f / _FILE).write_bytes(b""), f"{_FILE} is empty"),
        (lambda f: (f / _FILE).write_bytes(_LFS), f"{_FILE} is a Git LFS pointer"),
        (lambda f: (f / _FILE).unlink(), f"{_FILE} is missing"),
        (lambda f: (f / INDEX).write_text("[" * 100_000), f"{INDEX} is no index"),
        (lambda f: (f / INDEX).write_bytes(b"\xff\xfe"), f"{INDEX} is no index"),
        (lambda f: (f / INDEX).write_text('{"weight_map": [1]}'), f"{INDEX} is no index"),
        (_rename_all(f"../safetensors/{_FILE}"), "is no name of a file beside it"),
        (_rename_all("/etc/passwd"), "is no name of a file beside it"),
        (_edit(lambda i: i["weight_map"].popitem()), "is missing"),
        (_rename_all(7), "7 is no name of a file"),
        (_set_config(num_layers=10**18), r"num_layers|holds 39 tensors, its config says"),
        (_set_config(num_layers=10**4), "holds 39 tensors, its config says"),
        (_set_config(vocab_size=1024), r"is \(512, 64\), its config says \(1024, 64\)"),
    ],
)
@pytest.mark.parametrize("opened", [open_model, open_plainly])
def test_safetensors_that_are_not_what_was_written(made, tmp_path, change, message, opened):
    folder = tmp_path / "safetensors"
    shutil.copytree(made / "safetensors", folder)
    if change is not _flip:
        (folder / "checksums.json").unlink()  # as of one that others wrote
    change(folder)
    with pytest.raises(UserError, match=message):
        _read_all(opened(folder))
    if "Git LFS" in message or "no index" in message or "file" in message:
        with pytest.raises(ConvertError, match=message):
            describe(str(folder), None)


def test_a_damaged_tensor_of_a_large_file_is_named(made, tmp_path, monkeypatch):
    """Files of some size are not read twice: their tensors have the checksums."""
    monkeypatch.setattr(checksums, "_SMALL_BYTES", 1000)
    orbax_to_safetensors.export(made / "model", tmp_path / "out", 100_000)
    assert check(open_model(tmp_path / "out")) == 39
    _flip(tmp_path / "out")
    for opened in (open_model, open_plainly):
        with pytest.raises(UserError, match=rf"{_FILE}: transformer\.\S+ is damaged"):
            check(opened(tmp_path / "out"))


def _read_all(model):
    return model.embedding(), model.final_layernorm(), list(model.layers())


def test_safetensors_of_others_have_no_checksums(made, tmp_path):
    shutil.copytree(made / "safetensors", tmp_path / "in")
    (tmp_path / "in" / "checksums.json").unlink()
    _flip(tmp_path / "in")
    model = open_model(tmp_path / "in")
    assert model.kind == "safetensors, float16, without checksums"
    assert check(model) == 39


@pytest.mark.parametrize("form", ["model", "safetensors", "shards"])
def test_a_model_alone_is_checked(made, tmp_path, form):
    shutil.copytree(SHARDS if form == "shards" else made / form, tmp_path / "in")
    assert check(open_model(tmp_path / "in")) == 39
    data = [p for p in (tmp_path / "in").rglob("*") if p.is_file() and p.stat().st_size > 5000]
    for path in data:
        before = path.read_bytes()
        changed = bytearray(before)
        changed[len(changed) // 2] ^= 16
        path.write_bytes(bytes(changed))
        with pytest.raises(UserError, match="damaged"):
            check(open_model(tmp_path / "in"))
        path.write_bytes(before)
    assert len(data) >= {"model": 4, "safetensors": 4, "shards": 2}[form]


def _damage_one(part):
    """Of a part's larger files a byte."""
    path = max((p for p in part.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(bytes(data))


def _empty(name):
    return lambda part: [p.write_bytes(b"") for p in part.rglob(name)]


@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize(
    "harm",
    [_damage_one, _empty("_METADATA"), _empty("manifest.ocdbt"), _empty("_CHECKPOINT_METADATA"),
     _empty("checksums.json"), lambda part: (part / "checksums.json").unlink(),
     lambda part: [shutil.rmtree(part), part.mkdir()]],
)  # fmt: skip
def test_what_an_earlier_run_left_is_checked_before_it_counts(made, tmp_path, harm, index):
    """Of a conversion that ended with everything there but its name."""
    partial = tmp_path / "out.partial"
    shutil.copytree(made / "model", partial)
    (partial / "config.json").unlink()
    harm(sorted((partial / "params").iterdir())[index])
    convert_shards(SHARDS, tmp_path / "out", OPTIONS)
    assert check(open_model(tmp_path / "out")) == 39
    expected = load_golden("tp2", "float16")[1]
    jax.tree.map(np.testing.assert_array_equal, restore(tmp_path / "out")[1], expected)


def test_numbers_that_changed_in_what_an_earlier_run_left_are_found(tmp_path, monkeypatch):
    """Files of some size have no checksum of their own; all is read."""
    monkeypatch.setattr(checksums, "_SMALL_BYTES", 1000)
    convert_shards(SHARDS, tmp_path / "out", OPTIONS)
    (tmp_path / "out" / "config.json").unlink()
    (tmp_path / "out").rename(tmp_path / "out.partial")
    _damage_one(tmp_path / "out.partial" / "params" / parameter_files.layers_part(1, 2))
    convert_shards(SHARDS, tmp_path / "out", OPTIONS)
    assert check(open_model(tmp_path / "out")) == 39


def test_what_is_whole_is_not_written_again(made, tmp_path):
    partial = tmp_path / "out.partial"
    shutil.copytree(made / "model", partial)
    (partial / "config.json").unlink()
    times = {p.name: p.stat().st_ino for p in (partial / "params").iterdir()}
    convert_shards(SHARDS, tmp_path / "out", OPTIONS)
    assert times == {p.name: p.stat().st_ino for p in (tmp_path / "out" / "params").iterdir()}
