"""Released shards in every form that people have them in, and parts that are not whole."""

import dataclasses
import io
import json
import shutil
import tarfile
from typing import ClassVar

import fsspec
import jax
import numpy as np
import pytest
from conftest import GOLDEN, POSITIONS, load_golden
from fsspec.implementations.memory import MemoryFileSystem
from torch_files import read_module, save_torch

from convert import conversion
from convert.conversion import Options, convert_shards
from convert.errors import ConvertError
from convert.sat_reader import SatCheckpoint
from convert.sat_source import find_shards
from convert.sat_writer import write_shards
from glm_jax import files, restore
from glm_jax.checkpoints import parameter_files
from glm_jax.model.params import quantize_params
from glm_jax.quantization import Scheme

CHECKPOINTS = GOLDEN / "checkpoints"
OPTIONS = Options(max_sequence_length=POSITIONS)


@pytest.fixture
def archive(tmp_path):
    """The two-shard checkpoint as a tar archive in a folder of its own."""
    folder = tmp_path / "in"
    folder.mkdir()
    with tarfile.open(folder / "made-sat.tar", "w") as tar:
        tar.add(CHECKPOINTS / "tp2", "made-sat")
    return folder / "made-sat.tar"


def _cut(archive, names, size=None):
    """Replaces an archive by parts with such names."""
    data = archive.read_bytes()
    size = size or -(-len(data) // len(names))
    for i, name in enumerate(names):
        part = archive.with_name(f"{archive.name}.part_{name}")
        part.write_bytes(data[i * size : (i + 1) * size])
    archive.unlink()
    return archive.parent


def _numbers(count):
    return [f"{i:02d}" for i in range(count)]


def _assert_is_the_model(source, tmp_path):
    convert_shards(source, tmp_path / "out", OPTIONS)
    _, params = restore(tmp_path / "out")
    _, expected = load_golden("tp1", "float16")
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_a_tar_archive_and_its_folder(archive, tmp_path):
    _assert_is_the_model(archive, tmp_path)
    assert len(find_shards(archive.parent)) == 2


@pytest.mark.parametrize("count", [2, 7, 60])
def test_downloaded_parts_as_they_are(archive, tmp_path, count):
    folder = _cut(archive, _numbers(count))
    before = sorted((p.name, p.stat().st_size) for p in folder.iterdir())
    _assert_is_the_model(folder, tmp_path)
    assert sorted((p.name, p.stat().st_size) for p in folder.iterdir()) == before


def test_one_of_the_parts_stands_for_all_and_letters_count_too(archive, tmp_path):
    folder = _cut(archive, ["aa", "ab", "ac", "ad"])
    _assert_is_the_model(folder / "made-sat.tar.part_ab", tmp_path)


def test_parts_that_begin_with_one(archive):
    assert len(find_shards(_cut(archive, ["1", "2", "3"]))) == 2


@pytest.mark.parametrize("missing", [0, 3, 6])
def test_a_missing_part_is_named(archive, tmp_path, missing):
    folder = _cut(archive, _numbers(7))
    (folder / f"made-sat.tar.part_{missing:02d}").unlink()
    label = r"part_05 are\s+missing" if missing == 6 else f"part {missing:02d} of .* is missing"
    with pytest.raises(ConvertError, match=label):
        convert_shards(folder, tmp_path / "out", OPTIONS)
    assert not (tmp_path / "out").exists()


def test_a_part_of_the_wrong_size_is_named(archive):
    folder = _cut(archive, _numbers(5))
    part = folder / "made-sat.tar.part_02"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(ConvertError, match=r"part_02 has \d+ bytes.*fetch it again"):
        find_shards(folder)


def test_duplicate_parts_are_named(archive):
    folder = _cut(archive, _numbers(5))
    shutil.copy(folder / "made-sat.tar.part_02", folder / "made-sat.tar.part_2")
    with pytest.raises(ConvertError, match="are the same part"):
        find_shards(folder)
    (folder / "made-sat.tar.part_2").rename(folder / "made-sat.tar.part_02 (1)")
    with pytest.raises(ConvertError, match="is no part's name"):
        find_shards(folder)


def test_parts_in_a_wrong_order_are_refused_before_anything_is_written(archive, tmp_path):
    folder = _cut(archive, _numbers(9))
    first, second = (folder / f"made-sat.tar.part_0{i}" for i in (2, 3))
    first.rename(folder / "aside")
    second.rename(first)
    (folder / "aside").rename(second)
    with pytest.raises(ConvertError, match=r"wrong order|damaged|not a whole tar|PyTorch zip"):
        convert_shards(folder, tmp_path / "out", OPTIONS)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("cut", [100, 30_000, 300_000])
def test_a_truncated_archive(archive, tmp_path, cut):
    archive.write_bytes(archive.read_bytes()[:-cut])
    if cut == 100:
        return _assert_is_the_model(archive, tmp_path)  # zeros that end every archive
    with pytest.raises(ConvertError, match=r"ends at byte|not a whole tar|missing"):
        convert_shards(archive, tmp_path / "out", OPTIONS)
    assert not (tmp_path / "out").exists()
    return None


def test_names_that_lead_out_of_an_archive_are_refused(archive):
    with tarfile.open(archive, "a") as tar:
        tar.addfile(tarfile.TarInfo("made-sat/../../evil"), io.BytesIO())
    with pytest.raises(ConvertError, match=r"evil.*leads out of the archive"):
        find_shards(archive)


def test_seven_of_eight_shards(tmp_path):
    shutil.copytree(CHECKPOINTS / "tp8", tmp_path / "in")
    (tmp_path / "in" / "49300" / "mp_rank_07_model_states.pt").unlink()
    with pytest.raises(ConvertError, match=r"one of 8 shards.*there are 7: mp_rank_07"):
        convert_shards(tmp_path / "in", tmp_path / "out", OPTIONS)


def test_mixed_iterations(tmp_path):
    folder = tmp_path / "in"
    shutil.copytree(CHECKPOINTS / "tp2", folder)
    shutil.copytree(folder / "49300", folder / "49000")
    (folder / "latest").unlink()
    with pytest.raises(ConvertError, match=r"several iterations.*49000, 49300"):
        find_shards(folder)
    shutil.rmtree(folder / "49000")
    for rank in range(2):
        path = folder / "49300" / f"mp_rank_{rank:02d}_model_states.pt"
        save_torch(path, {"module": read_module(path), "iteration": 49300 - rank})
    with pytest.raises(ConvertError, match=r"iteration 49299.*49300"):
        SatCheckpoint(folder)


def test_without_frequencies_the_heads_must_be_given(tmp_path):
    folder = tmp_path / "in"
    shutil.copytree(CHECKPOINTS / "tp1", folder)
    path = folder / "49300" / "mp_rank_00_model_states.pt"
    kept = {n: x for n, x in read_module(path).items() if not n.endswith("inv_freq")}
    save_torch(path, {"module": kept})
    with pytest.raises(ConvertError, match="--num_heads"):
        convert_shards(folder, tmp_path / "out", OPTIONS)
    assert SatCheckpoint(folder).config(8, POSITIONS).num_heads == 8


def test_cast_and_quantised_on_the_way(tmp_path):
    convert_shards(
        CHECKPOINTS / "tp2", tmp_path / "cast", Options(max_sequence_length=64, dtype="bfloat16")
    )
    config, params = restore(tmp_path / "cast")
    assert config.param_dtype == config.compute_dtype == "bfloat16"
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"bfloat16"}
    _, float_params = load_golden("tp1", "float16")
    for scheme in ("int4", "int8,zero_point"):
        options = Options(max_sequence_length=64, quantization=scheme)
        convert_shards(CHECKPOINTS / "tp2", tmp_path / scheme, options)
        _, params = restore(tmp_path / scheme)
        expected = quantize_params(float_params, Scheme.parse(scheme))
        jax.tree.map(np.testing.assert_array_equal, params, expected)


class _Bucket(MemoryFileSystem):
    """What stands in for a bucket: the same calls, and bytes in memory."""

    protocol = ("gcs", "gs")
    store: ClassVar = {}
    pseudo_dirs: ClassVar = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("gs://").strip("/")


def test_an_address_is_read_through_its_library(archive, tmp_path):
    with pytest.raises(ConvertError, match="s3fs"):
        find_shards("s3://bucket/glm")  # that library is not installed here
    fsspec.register_implementation("gcs", _Bucket, clobber=True)
    bucket = fsspec.filesystem("gcs")
    for part in _cut(archive, _numbers(5)).iterdir():
        bucket.pipe(f"gs://bucket/glm/{part.name}", part.read_bytes())
    _assert_is_the_model("gs://bucket/glm", tmp_path)
    with pytest.raises(ConvertError, match="does not exist"):
        find_shards("gs://bucket/other")


def test_numbers_beyond_float16_are_refused(tmp_path):
    folder = tmp_path / "in"
    shutil.copytree(CHECKPOINTS / "tp1", folder)
    path = folder / "49300" / "mp_rank_00_model_states.pt"
    wide = {name: x.astype(np.float32) for name, x in read_module(path).items()}
    save_torch(path, {"module": wide})
    options = Options(max_sequence_length=POSITIONS, dtype="float16")
    convert_shards(folder, tmp_path / "narrow", options)
    _, params = restore(tmp_path / "narrow")
    jax.tree.map(np.testing.assert_array_equal, params, load_golden("tp1", "float16")[1])
    wide["transformer.layers.1.attention.dense.weight"][3, 4] = 1e5
    save_torch(path, {"module": wide})
    with pytest.raises(ConvertError, match=r"1 numbers of a tensor of \[1, 64, 64\]"):
        convert_shards(folder, tmp_path / "out", options)
    convert_shards(folder, tmp_path / "wide", Options(max_sequence_length=POSITIONS))
    with pytest.raises(ConvertError, match="beyond float16"):
        write_shards(tmp_path / "wide", tmp_path / "back", 2)
    assert not (tmp_path / "back").exists()


def test_two_processes_convert_halves_and_the_last_gives_the_name(tmp_path, capsys):
    for process in range(2):
        assert not (tmp_path / "out").exists()
        options = Options(max_sequence_length=POSITIONS, process_id=process, num_processes=2)
        convert_shards(CHECKPOINTS / "tp4", tmp_path / "out", options)
    assert "others are not yet" in capsys.readouterr().out
    _, params = restore(tmp_path / "out")
    _, expected = load_golden("tp1", "float16")
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_of_processes_that_end_at_once_one_gives_the_name(tmp_path, capsys, monkeypatch):
    """The other comes while the first is at it, or after it."""
    options = [
        dataclasses.replace(OPTIONS, process_id=i, num_processes=2, max_sequence_length=POSITIONS)
        for i in range(2)
    ]
    source = CHECKPOINTS / "tp4"
    convert_shards(source, tmp_path / "out", options[0])
    assert "others are not yet" in capsys.readouterr().out
    with files.locked(tmp_path / "out.partial"):
        convert_shards(source, tmp_path / "out", options[1])
    assert "another process gives" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()

    def overtaken(self):
        monkeypatch.undo()
        convert_shards(source, tmp_path / "out", OPTIONS)

    monkeypatch.setattr(conversion._Conversion, "write_parts", overtaken)
    convert_shards(source, tmp_path / "out", options[0])
    assert "another process gives" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    expected = load_golden("tp1", "float16")[1]
    jax.tree.map(np.testing.assert_array_equal, restore(tmp_path / "out")[1], expected)


def test_arrays_lie_in_pieces_and_provenance_beside_them(tmp_path):
    import orbax.checkpoint as ocp

    convert_shards(CHECKPOINTS / "tp2", tmp_path / "out", OPTIONS)
    with ocp.StandardCheckpointer() as checkpointer:
        folder = tmp_path / "out" / "params" / "layers_00001_00002"
        tree = checkpointer.metadata(folder).item_metadata.tree
    kernel = tree["query_key_value"]["kernel"]
    assert kernel.shape == (1, 64, 8, 3, 8)
    assert kernel.storage.chunk_shape == (1, 64, 1, 3, 8)  # of eight devices, one head each
    assert tree["dense"]["kernel"].storage.chunk_shape == (1, 8, 64)
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    shard = CHECKPOINTS / "tp2" / "49300" / "mp_rank_01_model_states.pt"
    source = provenance["sources"][1]
    assert (source["name"], source["bytes"]) == (str(shard), shard.stat().st_size)
    assert provenance["tool"].startswith("glm_jax ")
    assert len({s["entries_crc32"] for s in provenance["sources"]}) == 2


def test_without_room_nothing_is_begun_and_with_room_it_goes_on(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=300_000))
    said = r"no room for .*out\.partial \(0\.3 MiB are free of 0\.4"
    with pytest.raises(ConvertError, match=said):
        convert_shards(CHECKPOINTS / "tp2", tmp_path / "out", OPTIONS)
    assert not any((tmp_path / "out.partial" / "params").iterdir())
    monkeypatch.undo()
    _assert_is_the_model(CHECKPOINTS / "tp2", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_fills_up_keeps_what_was_converted(tmp_path, monkeypatch):
    write, written = parameter_files.write_part, []

    def failing(folder, name, tree):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(name)
        write(folder, name, tree)

    monkeypatch.setattr(parameter_files, "write_part", failing)
    with pytest.raises(ConvertError, match="what is converted stays; make room"):
        convert_shards(CHECKPOINTS / "tp2", tmp_path / "out", OPTIONS)
    assert {p.name for p in (tmp_path / "out.partial" / "params").iterdir()} == set(written)
    monkeypatch.undo()
    _assert_is_the_model(CHECKPOINTS / "tp2", tmp_path)


def test_what_was_left_by_no_conversion_is_no_part_of_one(tmp_path):
    """A model that was being saved under the same name."""
    convert_shards(CHECKPOINTS / "int8_tp2", tmp_path / "out", OPTIONS)
    (tmp_path / "out" / "provenance.json").unlink()
    (tmp_path / "out").rename(tmp_path / "out.partial")
    _assert_is_the_model(CHECKPOINTS / "tp2", tmp_path)


def test_one_that_was_killed_at_the_very_end_goes_on(tmp_path):
    convert_shards(CHECKPOINTS / "tp2", tmp_path / "out", OPTIONS)
    (tmp_path / "out" / "config.json").unlink()
    (tmp_path / "out").rename(tmp_path / "out.partial")
    with pytest.raises(ConvertError, match="of another source or with other options"):
        convert_shards(CHECKPOINTS / "tp4", tmp_path / "out", OPTIONS)
    _assert_is_the_model(CHECKPOINTS / "tp2", tmp_path)


def test_a_conversion_under_way_is_of_one_source(tmp_path):
    options = Options(max_sequence_length=POSITIONS, num_processes=2)
    convert_shards(CHECKPOINTS / "tp2", tmp_path / "out", options)
    with pytest.raises(ConvertError, match="of another source or with other options"):
        convert_shards(CHECKPOINTS / "tp4", tmp_path / "out", OPTIONS)
    convert_shards(CHECKPOINTS / "tp2", tmp_path / "out", OPTIONS)
    assert (tmp_path / "out" / "config.json").exists()
