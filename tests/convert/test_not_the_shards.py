"""Files that are no shards, shards under other names or there twice, and weights of odd dtypes."""

import dataclasses
import gzip
import shutil

import jax
import numpy as np
import pytest
from conftest import GOLDEN, POSITIONS, load_golden
from torch_files import read_module, save_torch

from convert import inspect as inspect_tool
from convert.conversion import Options, convert_shards
from convert.errors import ConvertError
from convert.model_readers import open_model, open_plainly
from convert.sat_reader import SatCheckpoint
from convert.sat_source import find_shards
from convert.verify import compare
from glm_jax import restore
from glm_jax.errors import UserError

CHECKPOINTS = GOLDEN / "checkpoints"
OPTIONS = Options(max_sequence_length=POSITIONS)


@pytest.fixture
def four(tmp_path):
    shutil.copytree(CHECKPOINTS / "tp4", tmp_path / "in")
    return tmp_path / "in" / "49300"


def _shard(folder, rank):
    return folder / f"mp_rank_{rank:02d}_model_states.pt"


def test_a_shard_under_another_name_is_refused(four, tmp_path):
    """It says itself which one it is."""
    shutil.copy(_shard(four, 1), _shard(four, 2))
    with pytest.raises(
        ConvertError, match=r"mp_rank_02.* is the shard mp_rank_01.*fetch mp_rank_02"
    ):
        convert_shards(four, tmp_path / "out", OPTIONS)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    with pytest.raises(ConvertError, match="is the shard mp_rank_01"):
        inspect_tool.describe(str(four), None)
    with pytest.raises(ConvertError, match="is the shard mp_rank_01"):
        open_model(four)


def test_a_path_that_is_no_shards_says_what_to_give(four, tmp_path):
    with pytest.raises(ConvertError, match=rf"latest says which shards .*: give {four.parent}$"):
        find_shards(four.parent / "latest")
    (tmp_path / "run").mkdir()
    with pytest.raises(ConvertError, match=r"run holds no mp_rank_RR.*: give a folder of released"):
        find_shards(tmp_path / "run")


@pytest.mark.parametrize(
    "name", ["final_layernorm.bias", "layers.1.attention.dense.bias", "layers.2.input_layernorm"]
)
def test_shards_that_differ_in_what_each_has_whole_are_refused(four, tmp_path, capsys, name):
    name = f"transformer.{name}" + ("" if name.endswith("bias") else ".weight")
    module = read_module(_shard(four, 2))
    module[name] = module[name].copy()
    module[name][3] += 0.5
    save_torch(_shard(four, 2), {"module": module})
    message = rf"1 tensors .*1 numbers of .*mp_rank_02.*'s {name} differ.* by up to 0.5"
    for refuse in (
        lambda: convert_shards(four, tmp_path / "out", OPTIONS),
        lambda: open_model(four),
    ):
        with pytest.raises(ConvertError, match=message):
            refuse()
    options = dataclasses.replace(OPTIONS, allow_differing_copies=True)
    convert_shards(four, tmp_path / "out", options)
    assert f"'s {name} differ from the first shard's" in capsys.readouterr().out
    plain = open_plainly(four, None, allow_differing_copies=True)
    assert name in plain.kind
    assert list(compare(open_model(tmp_path / "out"), plain)) == [None] * 39


@pytest.mark.parametrize("twice", [(0, 1), (1, 2), (3, 0)])
def test_a_shard_that_is_there_twice_is_refused_by_its_checksums(four, twice):
    """Archives of some tools all have one name; what else is in them may differ."""
    first, second = twice
    module = read_module(_shard(four, first))
    module["transformer.final_layernorm.bias"] = module["transformer.final_layernorm.bias"] + 1
    save_torch(_shard(four, second), {"module": module, "rank": second}, saved_as="archive")
    low, high = sorted(twice)
    message = rf"mp_rank_0{high}.* and .*mp_rank_0{low}.* hold the same weights"
    with pytest.raises(ConvertError, match=message):
        SatCheckpoint(four).config(None, POSITIONS)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n",
            "Git LFS.*lfs pull",
        ),
        (
            b"\n<!DOCTYPE html><html><body>Sign in</body></html>",
            "web page.*download the file again",
        ),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "web page"),
        (b"\xef\xbb\xbf<html>", "web page"),
        (b'{"error": "Invalid credentials"}', "is JSON"),
        (
            b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.",
            r"before 1\.6.*torch\.save",
        ),
        (gzip.compress(b"PK", mtime=0), "gzip"),
        (b"\x28\xb5\x2f\xfd1234", "zstd"),
        (b"\x80\x04\x95\x00\x00", "a pickle by itself"),
        (b"\0" * 4096, "begins with zeros"),
        (b"\x10\0\0\0\0\0\0\0" + b'{"a":0}' + b" " * 99, "a safetensors file"),
        (b"", "is empty"),
        (b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02", "a tokenizer's file.*the model's folder"),
        (b"PK\x03\x04" + b"1" * 100, "truncated"),
        (b"anything else", "truncated or not a PyTorch zip file"),
    ],
)
def test_a_file_that_is_no_shard_is_called_what_it_is(four, tmp_path, data, message):
    _shard(four, 3).write_bytes(data)
    with pytest.raises(ConvertError, match=rf"mp_rank_03\S* .*{message}"):
        convert_shards(four, tmp_path / "out", OPTIONS)
    archive = tmp_path / "a.tar"
    archive.write_bytes(data)
    if b"PK" not in data and "truncated" not in message and b"\0" * 9 not in data:
        with pytest.raises(ConvertError, match=rf"a\.tar .*{message}"):
            find_shards(archive)


def test_one_shard_is_no_input(four):
    with pytest.raises(ConvertError, match="one shard perhaps: give the folder"):
        find_shards(_shard(four, 1))


@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16", "float32"])
@pytest.mark.parametrize("names", ["", "layernorm"])
def test_float64_becomes_what_is_asked_for_or_float32(four, tmp_path, dtype, names):
    for rank in range(4):
        module = read_module(_shard(four, rank))
        save_torch(
            _shard(four, rank),
            {"module": {n: x.astype(np.float64) if names in n else x for n, x in module.items()}},
        )
    convert_shards(four, tmp_path / "out", dataclasses.replace(OPTIONS, dtype=dtype))
    config, params = restore(tmp_path / "out")
    assert config.param_dtype == (dtype or ("float16" if names else "float32"))
    _, expected = load_golden("tp1", "float16")
    to = lambda x: np.asarray(x).astype(dtype or np.float32)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(to(x), to(y)), params, expected)
    if dtype is None:
        assert list(compare(open_model(tmp_path / "out"), open_plainly(four))) == [None] * 39


@pytest.mark.parametrize("name", ["attention.dense.bias", "mlp.dense_4h_to_h.weight"])
def test_tensors_of_another_dtype_than_the_embedding_are_cast_or_refused(
    four, tmp_path, capsys, name
):
    """Read into float16 a larger float32 would be infinite."""
    name = f"transformer.layers.1.{name}"

    def write(number):
        for rank in range(4):
            module = read_module(_shard(four, rank))
            module[name] = module[name].astype(np.float32)
            module[name].reshape(-1)[5] = number
            save_torch(_shard(four, rank), {"module": module})

    write(1e6)
    with pytest.raises(ConvertError, match=r"numbers of a tensor .* are beyond float16"):
        convert_shards(four, tmp_path / "out", OPTIONS)
    write(0.5)
    convert_shards(four, tmp_path / "out", OPTIONS)
    assert "1 tensors are cast to float16, the embedding's dtype" in capsys.readouterr().out
    # A number that float16 rounds is no difference; one that is another is.
    for number, differing in ((0.5, 0), (0.500001, 0), (0.501, 1)):
        write(number)
        found = list(compare(open_model(tmp_path / "out"), open_plainly(four)))
        assert len(found) - found.count(None) == differing


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_numbers_beyond_any_dtype_are_refused(four, tmp_path, dtype):
    module = read_module(_shard(four, 0))
    wide = {name: x.astype(np.float64) for name, x in module.items()}
    name = "transformer.layers.1.mlp.dense_h_to_4h.bias"
    wide[name][5] = 3.4e38 if dtype == "bfloat16" else 1e300
    for rank in range(4):
        others = {n: x.astype(np.float64) for n, x in read_module(_shard(four, rank)).items()}
        save_torch(_shard(four, rank), {"module": wide if rank == 0 else others})
    with pytest.raises(ConvertError, match=rf"1 numbers of a tensor .* beyond {dtype}"):
        convert_shards(four, tmp_path / "out", dataclasses.replace(OPTIONS, dtype=dtype))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("transformer.layers.0.attention.dense.weight", "int8"),
     ("transformer.word_embeddings.weight", "int64"), ("transformer.final_layernorm.bias", "bool")],
)  # fmt: skip
def test_integers_are_no_float_weights(four, tmp_path, name, dtype):
    for rank in range(4):
        module = read_module(_shard(four, rank))
        save_torch(_shard(four, rank), {"module": module | {name: module[name].astype(dtype)}})
    with pytest.raises(UserError, match=rf"{dtype}"):
        convert_shards(four, tmp_path / "out", OPTIONS)


def test_a_file_of_another_byte_order_is_refused(tmp_path):
    shutil.copytree(CHECKPOINTS / "tp1", tmp_path / "in")
    path = _shard(tmp_path / "in" / "49300", 0)
    data = path.read_bytes()
    place = data.index(b"little")
    path.write_bytes(data[:place] + b"bigend" + data[place + 6 :])
    with pytest.raises(ConvertError, match="another byte order"):
        SatCheckpoint(tmp_path / "in")
