"""Tensors of shards that are views: whatever their strides, the model is the same."""

import shutil

import jax
import numpy as np
import pytest
from conftest import GOLDEN, POSITIONS, load_golden
from torch_files import View, read_module, save_torch

from convert import sat_reader, torch_file
from convert.conversion import Options, convert_shards
from convert.errors import ConvertError
from convert.model_readers import open_model, open_plainly
from convert.torch_file import LazyTensor, TorchFile
from convert.verify import compare
from glm_jax import restore

CHECKPOINTS = GOLDEN / "checkpoints"
SHARD = "49300/mp_rank_01_model_states.pt"
EMBEDDING = "transformer.word_embeddings.weight"


def _copied(array, make, fill=0):
    """A view that `make` takes of a larger array of a shape that it is asked for."""
    base, view = make(array.shape, lambda shape: np.full(shape, fill, array.dtype))
    view[...] = array
    return View(view, base)


def _column_major(shape, new):
    base = new(shape[::-1])
    return base, base.T


def _padded(shape, new):
    base = new((*shape[:-1], shape[-1] + 3))
    return base, base[..., : shape[-1]]


def _every_other(shape, new):
    base = new((2 * shape[0], *shape[1:]))
    return base, base[1::2]


def _every_third_column(shape, new):
    base = new((*shape[:-1], 3 * shape[-1]))
    return base, base[..., 2::3]


def _offset(shape, new):
    base = new((shape[0] + 5, *shape[1:]))
    return base, base[5:]


def _last_axis_of_many(shape, new):
    base = new((*shape, 4))
    return base, base[..., 2]


LAYOUTS = {
    f.__name__.strip("_"): f
    for f in (_column_major, _padded, _every_other, _every_third_column, _offset,
              _last_axis_of_many)
}  # fmt: skip


@pytest.fixture
def shards(tmp_path):
    shutil.copytree(CHECKPOINTS / "tp2", tmp_path / "in")
    return tmp_path / "in"


def _rewrite(shards, change):
    """Both shards with each matrix as `change` gives it."""
    for rank in range(2):
        path = shards / "49300" / f"mp_rank_{rank:02d}_model_states.pt"
        module = {n: change(n, x) if x.ndim == 2 else x for n, x in read_module(path).items()}
        save_torch(path, {"module": module})


@pytest.mark.parametrize("block_bytes", [16, 300, 1 << 26])
def test_rows_are_read_in_blocks(tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(torch_file, "_BLOCK_BYTES", block_bytes)
    values = np.arange(30 * 14, dtype=np.float32).reshape(30, 14)
    views = {name: _copied(values, layout, fill=-1) for name, layout in LAYOUTS.items()}
    base = values.reshape(5, 6, 14)
    views |= {
        "turned": View(base.transpose(2, 0, 1), base),
        "scalar": View(base[1, 2, 3, ...], base),
    }
    views |= {"diagonal": View(values.diagonal(), values), "empty": View(values[:0], values)}
    save_torch(tmp_path / "a.pt", {"module": views})
    for name, tensor in TorchFile(tmp_path / "a.pt").content["module"].items():
        found = tensor.read()
        assert found.flags.c_contiguous
        np.testing.assert_array_equal(found, views[name].array, err_msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_all_matrices_is_the_same_model(shards, tmp_path, layout):
    _rewrite(shards, lambda _, x: _copied(x, LAYOUTS[layout], fill=7))
    convert_shards(shards, tmp_path / "out", Options(max_sequence_length=POSITIONS))
    _, expected = load_golden("tp1", "float16")
    jax.tree.map(np.testing.assert_array_equal, restore(tmp_path / "out")[1], expected)
    for one in (open_model(tmp_path / "out"), open_model(shards)):
        assert list(compare(one, open_plainly(shards))) == [None] * 39


@pytest.mark.parametrize("names", [EMBEDDING, ""])
def test_expanded_and_overlapping_rows_are_read(shards, tmp_path, names):
    """One row for all, and rows that begin one number after the row before."""

    def expanded(name, x):
        if name.startswith(names):
            return View(np.broadcast_to(x[:1], x.shape), x[:1])
        windows = np.lib.stride_tricks.sliding_window_view(x.reshape(-1), x.shape[1])
        return View(windows[: len(x)], x.reshape(-1))

    before = {name: x.copy() for name, x in read_module(shards / SHARD).items()}
    _rewrite(shards, expanded)
    after = read_module(shards / SHARD)
    np.testing.assert_array_equal(after[EMBEDDING], before[EMBEDDING][:1].repeat(256, 0))
    name = "transformer.layers.0.attention.dense.weight"
    flat = before[name].reshape(-1)
    expected = np.stack([flat[i : i + 32] if names else flat[:32] for i in range(64)])
    np.testing.assert_array_equal(after[name], expected)
    convert_shards(shards, tmp_path / "out", Options(max_sequence_length=POSITIONS))
    assert list(compare(open_model(tmp_path / "out"), open_plainly(shards))) == [None] * 39


def test_verify_finds_what_the_converter_scrambles(shards, tmp_path, monkeypatch):
    """The converter as it was: columns taken for rows."""

    def wrong(self, allocate=np.empty):
        whole = allocate(self.shape, self.dtype)
        self.file.read_elements(self.storage, self.offset, whole.reshape(-1))
        return whole

    _rewrite(shards, lambda name, x: _copied(x, _column_major) if name == EMBEDDING else x)
    with monkeypatch.context() as patched:
        patched.setattr(LazyTensor, "read", wrong)
        convert_shards(shards, tmp_path / "out", Options(max_sequence_length=POSITIONS))
        found = [d for d in compare(open_model(tmp_path / "out"), open_plainly(shards)) if d]
    assert [d.name for d in found] == ["word_embeddings"]
    assert found[0].numbers > 30_000


def test_verify_finds_shards_that_are_joined_wrongly(shards, tmp_path, monkeypatch):
    """Of a layer's parts, which the converter joins and turns."""
    join = sat_reader.sat_layout.merge_linear

    def wrong(config, name, count, read, *rest):
        return join(config, name, count, lambda kind, rank: read(kind, count - 1 - rank), *rest)

    monkeypatch.setattr(sat_reader.sat_layout, "merge_linear", wrong)
    convert_shards(shards, tmp_path / "out", Options(max_sequence_length=POSITIONS))
    found = [d for d in compare(open_model(tmp_path / "out"), open_plainly(shards)) if d]
    # Four kernels of three layers; biases of those that are split by outputs, and one of each
    # that is not and is the same in all shards.
    assert len([d for d in found if d.name.endswith("kernel")]) == 12


def test_damage_anywhere_in_a_storage_is_found_by_each_tensor_of_it(shards):
    """Not only in the numbers of the tensor itself: the checksum is of all."""
    base = np.arange(4096, dtype=np.float16)
    views = {"a": View(base[:64], base), "b": View(base[64:128].reshape(8, 8).T, base)}
    save_torch(shards / SHARD, {"module": views})
    np.testing.assert_array_equal(
        TorchFile(shards / SHARD).content["module"]["a"].read(), base[:64]
    )
    data = bytearray((shards / SHARD).read_bytes())
    place = data.index(base[2000:2010].tobytes())
    data[place] ^= 1
    (shards / SHARD).write_bytes(bytes(data))
    for _ in range(2):
        module = TorchFile(shards / SHARD).content["module"]
        for name in ("a", "b", "a"):
            with pytest.raises(ConvertError, match=r"mp_rank_01.*data/0 is damaged"):
                module[name].read()
    unchecked = TorchFile(shards / SHARD, is_checked=False).content["module"]["b"].read()
    np.testing.assert_array_equal(unchecked, base[64:128].reshape(8, 8).T)


def test_a_storage_is_checked_once_for_all_its_tensors(shards, monkeypatch):
    base = np.arange(1 << 16, dtype=np.float16)
    views = {f"t{i}": View(base[64 * i : 64 * i + 64], base) for i in range(200)}
    save_torch(shards / SHARD, {"module": views})
    file = TorchFile(shards / SHARD)
    read, into = [], file.source.read_into
    monkeypatch.setattr(
        file.source, "read_into", lambda at, to: (read.append(len(to)), into(at, to))
    )
    for i, tensor in enumerate(file.content["module"].values()):
        np.testing.assert_array_equal(tensor.read(), base[64 * i : 64 * i + 64])
    assert sum(read) == base.nbytes + 200 * 128
