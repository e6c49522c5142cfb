"""Files that mean harm, or were damaged: one clear line, nothing run, nothing left."""

import contextlib
import os
import pickle
import shutil
import signal
import struct
import tarfile
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
from conftest import GOLDEN, POSITIONS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch_files import write_torch_file

from convert import sat_reader, torch_pickle
from convert.byte_source import RangeBytes, read
from convert.conversion import Options, convert_shards
from convert.errors import ConvertError
from convert.sat_source import find_shards
from convert.torch_file import TorchFile

CHECKPOINTS = GOLDEN / "checkpoints"
SHARD = CHECKPOINTS / "tp1" / "49300" / "mp_rank_00_model_states.pt"
OPTIONS = Options(max_sequence_length=POSITIONS)


class _Calls:
    def __init__(self, function, *arguments):
        self._call = (function, arguments)

    def __reduce__(self):
        return self._call


def _archive(path, pickled, compression=zipfile.ZIP_STORED, **more):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("a/data.pkl", pickled)
        for name, data in more.items():
            archive.writestr("a/" + name.replace("__", "/"), data)
    return path


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_a_pickle_that_calls_the_system_runs_nothing(tmp_path, protocol):
    marker = tmp_path / "was_run"
    pickled = pickle.dumps({"module": _Calls(os.system, f"touch {marker}")}, protocol)
    with pytest.raises(ConvertError, match=r"asks for posix\.system.*nothing of it was run"):
        TorchFile(_archive(tmp_path / "a.pt", pickled))
    assert not marker.exists()


def test_what_known_packages_name_is_not_called_either(tmp_path):
    pickled = b"\x80\x02ctorch.hub\nload\nX\x01\x00\x00\x00a\x85R."
    content = TorchFile(_archive(tmp_path / "a.pt", pickled)).content
    assert content == torch_pickle.Foreign("torch.hub.load")


def test_a_zip_bomb_is_refused_unopened(tmp_path):
    path = _archive(tmp_path / "a.pt", b"\0" * 50_000_000, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    tracemalloc.start()
    with pytest.raises(ConvertError, match="is compressed"):
        TorchFile(path)
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_names_that_lead_out_are_refused(tmp_path):
    path = _archive(tmp_path / "a.pt", b"\x80\x02}.", **{"..__..__evil": b"x"})
    with pytest.raises(ConvertError, match="leads out of the archive"):
        TorchFile(path)


def _tensor_pickle(shape, strides, size, count=1):
    """A module of tensors of one storage, as the writer pickles them, with other numbers."""
    integer = lambda n: (
        b"\x8a" + bytes([n.bit_length() // 8 + 1]) + n.to_bytes(n.bit_length() // 8 + 1, "little")
    )
    text = lambda s: b"X" + struct.pack("<I", len(s)) + s.encode()
    numbers = lambda values: b"(" + b"".join(map(integer, values)) + b"t"
    storage = b"(" + text("storage") + b"ctorch\nHalfStorage\n" + text("0") + text("cpu")
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + integer(size) + b"tQ" + integer(0)
    tensor += numbers(shape) + numbers(strides) + b"\x89ccollections\nOrderedDict\n)RtR"
    items = b"".join(text(f"t{i}") + tensor for i in range(count))
    return b"\x80\x02}" + text("module") + b"}(" + items + b"us."


def _read_all(source):
    return [tensor.read() for tensor in TorchFile(source).content["module"].values()]


@pytest.mark.parametrize(
    ("shape", "strides", "size", "count", "message"),
    [
        ((2**40, 2**40), (0, 0), 1, 1, "claim more than"),
        ((4096,), (1,), 4096, 100, "claim more than"),
        ((2**62, 2**62), (1, 1), 8, 1, "reaches element"),
        ((4,), (1, 1), 8, 1, "strides"),
        ((8,), (1,), 2**60, 1, "its tensors need"),
        ((0, 2**62), (2**62, 2**62), 8, 1, "claim more than"),
        ((0, 2**40), (1, 1), 8, 1, "claim more than"),
        ((0, 2**1000), (1, 1), 8, 1, "are no sizes"),
        ((0,) * 6000, (2**60,) * 6000, 8, 1, "6000 axes"),
        ((2, 2048), (2048, 0), 4096, 400, "claim more than"),  # a storage again and again
    ],
)
def test_tensors_that_claim_more_than_there_is(tmp_path, shape, strides, size, count, message):
    pickled = _tensor_pickle(shape, strides, size, count)
    path = _archive(tmp_path / "a.pt", pickled, data__0=b"\0" * 8192)
    with pytest.raises(ConvertError, match=message):
        _read_all(path)


_ORDERED = b"ccollections\nOrderedDict\n"
_PAIRS = b"(" + b"(K\x01K\x02t" * 900 + b"lq\x010"
_MANY_PAIRS = b"(" + b"h\x01" * 900 + b"tq\x020"
_LONG = b"a" * (1 << 19)
_USED_AS_KEY = b"q\x010}" + b"h\x01Ns" * 9000 + b"."
_SHAPE = b"(" + b"K\x00" * 6000 + b"tq\x010"
_REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\nq\x020"
_STORAGE = b"(X\x07\x00\x00\x00storagectorch\nHalfStorage\nX\x01\x00\x00\x000NK\x01tQq\x030"


_TENSOR = b"h\x02(h\x03K\x00h\x01h\x01tR"


@pytest.mark.parametrize(
    "pickled",
    [
        # Dictionaries of the same pairs, many times over, in as many calls.
        b"\x80\x02" + _PAIRS + _MANY_PAIRS + b"(" + (_ORDERED + b"h\x02R") * 900 + b"t.",
        b"\x80\x02" + _PAIRS + b"(" + (_ORDERED + b"h\x01\x85R") * 900 + b"t.",
        b"\x80\x02" + (_ORDERED + b"(") * 900 + b")" + b"tR" * 900 + b".",
        # One shape for tensor after tensor.
        b"\x80\x02" + _SHAPE + _REBUILD + _STORAGE + b"(" + _TENSOR * 3000 + b"t.",
        # A long number, a long text and a long name, used again and again.
        b"\x80\x02\x8b" + struct.pack("<I", 1 << 19) + _LONG + _USED_AS_KEY,
        b"\x80\x02X" + struct.pack("<I", 1 << 19) + _LONG + _USED_AS_KEY,
        b"\x80\x02ctorch\n" + _LONG + b"\nq\x010(" + b"h\x01)R" * 8000 + b"t.",
        b"\x80\x02" + b"]" * 3_000_000 + b".",  # a list a byte
        b"\x80\x02)" + b"2\x86" * 60 + b"q\x00}h\x00K\x01s.",  # hashing it takes 2^60 steps
        b"\x80\x02}r\xff\xff\xff\x7f.",  # a memo of 2^31 places
        b"\x80\x02\x96\xff\xff\xff\xff\xff\x0f\x00\x00.",  # a bytearray of terabytes
        b"\x80\x02\x8b\xff\xff\xff\x7f1.",  # an integer of two gigabytes
        b"\x80\x02(((((((.", b"\x80\x02.", b"", b"\x80\x02tttt.", b"\x80\x02R.", b"\x80\x02h\x05.",
    ],
)  # fmt: skip
def test_pickles_that_exhaust_or_are_nonsense_end_soon(tmp_path, pickled):
    path = _archive(tmp_path / "a.pt", pickled)
    tracemalloc.start()
    began = time.process_time()
    with contextlib.suppress(ConvertError):
        TorchFile(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - began < 5
    assert peak < 2 * len(pickled) + 8_000_000


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_counted_and_named(tmp_path, value, capsys):
    folder = tmp_path / "in"
    shutil.copytree(CHECKPOINTS / "tp2", folder)
    path = folder / "49300" / "mp_rank_01_model_states.pt"
    name = "transformer.layers.2.mlp.dense_h_to_4h.weight"
    tensors = TorchFile(path).content["module"]
    module = {key: tensor.read() for key, tensor in tensors.items()}
    module[name][3, 5:8] = value
    write_torch_file(path, module)
    with pytest.raises(ConvertError, match=rf"3 in {name} of rank 1.*--allow_non_finite"):
        convert_shards(folder, tmp_path / "out", OPTIONS)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    options = Options(max_sequence_length=POSITIONS, allow_non_finite=True)
    convert_shards(folder, tmp_path / "out", options)
    assert f"{name} of rank 1 holds 3 numbers" in capsys.readouterr().out


def test_a_storage_that_is_too_short_is_refused(tmp_path):
    with zipfile.ZipFile(SHARD) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    key = next(name for name in entries if name.endswith("data/3"))
    entries[key] = entries[key][:-2]
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    module = TorchFile(tmp_path / "b.pt").content["module"]
    with pytest.raises(ConvertError, match=r"data/3 holds \d+ bytes, its tensors need"):
        [tensor.read() for tensor in module.values()]


class _Memory:
    """A file in memory, as a source."""

    def __init__(self, data):
        self.name, self.size, self._data = "mutated", len(data), data

    def read_into(self, offset, buffer):
        part = self._data[offset : offset + len(buffer)]
        if len(part) < len(buffer):
            raise ConvertError("mutated ends before: truncated")
        buffer[:] = part


_WHOLE = SHARD.read_bytes()
_read_all(_Memory(_WHOLE))  # what the standard library loads at its first use is not counted
_PICKLE = _WHOLE.index(b"\x80\x02")
_DIRECTORY = _WHOLE.rindex(b"PK\x01\x02\x00") - 4000
_PLACES = st.one_of(
    st.integers(0, len(_WHOLE) - 1),
    st.integers(_PICKLE, _PICKLE + 6000),
    st.integers(_DIRECTORY, len(_WHOLE) - 1),
)


@pytest.mark.slow
@settings(max_examples=2200, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(
    changes=st.lists(st.tuples(_PLACES, st.binary(min_size=1, max_size=6)), max_size=5),
    cut=st.none() | st.tuples(_PLACES, _PLACES),
)
def test_two_thousand_mutated_files(changes, cut):
    """None runs foreign code, allocates twice the file or more, or takes a second."""
    data = bytearray(_WHOLE)
    for place, new in changes:
        data[place : place + len(new)] = new
    if cut is not None:
        del data[min(cut) : max(cut)]
    calls = []
    before = os.system
    os.system = lambda *a: calls.append(a)
    signal.alarm(20)  # a hang ends the test
    source = _Memory(bytes(data))
    tracemalloc.start()
    try:
        with contextlib.suppress(ConvertError):
            for tensor in sat_reader.module(TorchFile(source)).values():
                tensor.read()
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        signal.alarm(0)
        os.system = before
    assert not calls
    assert peak < 2 * len(_WHOLE), peak


@pytest.mark.parametrize("size", ["-1536", "-512", "-1", "-99999999999999999999999", "9" * 30])
def test_entries_of_a_tar_archive_have_a_size(tmp_path, size):
    """Going back by 1536 bytes a reader is where it began."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        entry = tarfile.TarInfo("x/mp_rank_00_model_states.pt")
        entry.pax_headers = {"size": size}
        tar.addfile(entry)
        tar.addfile(tarfile.TarInfo("x/latest"))
    signal.alarm(20)  # a hang ends the test
    with pytest.raises(ConvertError, match=r"a\.tar.*(no possible size|are needed)"):
        find_shards(tmp_path / "a.tar")
    signal.alarm(0)


def test_headers_of_headers_end(tmp_path):
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = b"L", 512
    block = header.tobuf(tarfile.GNU_FORMAT) + b"a" * 512
    (tmp_path / "a.tar").write_bytes(block * 3000)
    with pytest.raises(ConvertError, match="not a whole tar archive"):
        find_shards(tmp_path / "a.tar")
    header.size = 1 << 60
    (tmp_path / "a.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + b"a" * 512)
    with pytest.raises(ConvertError, match="not a whole tar archive"):
        find_shards(tmp_path / "a.tar")


@pytest.mark.parametrize("rank", ["30000000", "999999999", "9" * 200])
def test_ranks_and_layers_cost_nothing_by_their_numbers(tmp_path, rank):
    (tmp_path / f"mp_rank_{rank}_model_states.pt").touch()
    tracemalloc.start()
    with pytest.raises(
        ConvertError, match=r"mp_rank_00_model_states\.pt is missing|holds no mp_rank"
    ):
        find_shards(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("layer", ["3", "7", "99999999", "99999999999", "9" * 5000])
def test_a_layer_without_those_before_it_is_refused(tmp_path, layer):
    path = tmp_path / "mp_rank_00_model_states.pt"
    module = {n: t.read() for n, t in TorchFile(SHARD).content["module"].items()}
    weight = module.pop("transformer.layers.2.attention.dense.weight")
    beyond = {f"transformer.layers.{layer}.attention.dense.weight": weight}
    write_torch_file(path, module | beyond)
    message = rf"layer {layer}, and none of layer 3" if len(layer) in (1, 8) else "is missing"
    if layer == "3":
        message = "is missing"
    began = time.process_time()
    with pytest.raises(ConvertError, match=message):
        convert_shards(tmp_path, tmp_path / "out", OPTIONS)
    assert time.process_time() - began < 2


def test_ranges_do_not_reach_beyond_themselves():
    inner = RangeBytes(_Memory(b"0123456789"), "inner", 2, 5)
    assert read(inner, 1, 3) == b"345"
    with pytest.raises(ConvertError, match="inner ends at byte 5"):
        read(inner, 3, 3)
