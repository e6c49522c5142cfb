"""Model folders and adapters that are not what was written: nothing is read in silence."""

import contextlib
import json
import math
import random
import shutil

import jax
import numpy as np
import pytest
import tensorstore as ts

from glm_jax.checkpoints import checksums, parameter_files
from glm_jax.checkpoints.adapter_folder import load_adapter, save_adapter
from glm_jax.checkpoints.checksums import CHECKSUMS_FILE, Chunks, DamageError, chunk_checksum
from glm_jax.checkpoints.model_folder import check_model, load_config, restore, save_model
from glm_jax.checkpoints.parameter_files import CheckpointError
from glm_jax.checkpoints.stored_values import StoredValues
from glm_jax.config import glm_config
from glm_jax.errors import UserError
from glm_jax.model import adapters
from glm_jax.model import params as glm_params
from glm_jax.model.adapters import AdapterConfig
from glm_jax.sharding import make_mesh
from glm_jax.training.results import replace_result

CONFIG = glm_config("tiny", vocab_size=64, hidden_size=32, inner_hidden_size=64, num_heads=2)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "model"
    params = glm_params.init(CONFIG, jax.random.key(0))
    save_model(folder, CONFIG, params)
    return folder, params


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written[0], tmp_path / "model")


def _files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def _flipped(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _zeroed(path, rng):
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content))
    while not any(content[start : start + 64]):
        start = rng.randrange(len(content))
    content[start : start + 64] = bytes(len(content[start : start + 64]))
    path.write_bytes(content)


@pytest.mark.parametrize("change", [_flipped, _zeroed])
def test_a_change_at_any_place_of_any_file_of_parameters_is_found(change, folder):
    rng = random.Random(0)
    for path in _files(folder / "params"):
        content = path.read_bytes()
        for _ in range(3 if len(content) > 4096 else 1):
            if content:
                change(path, rng)
                with pytest.raises(UserError, match=r"is damaged|has no checksum"):
                    restore(folder)
                path.write_bytes(content)
    restore(folder)


def test_chunks_are_checked_as_they_are_read(written, tmp_path, monkeypatch):
    """In large files, which are not read twice."""
    monkeypatch.setattr(checksums, "_SMALL_BYTES", -1)
    folder = tmp_path / "model"
    save_model(folder, CONFIG, written[1])
    for path in _files(folder / "params"):
        if path.stat().st_size < 8192:
            continue
        content, found = path.read_bytes(), 0
        for seed in range(6):
            (_flipped, _zeroed)[seed % 2](path, random.Random(seed))
            try:
                _assert_equal(restore(folder)[1], written[1])
            except DamageError:
                found += 1
            path.write_bytes(content)
        assert found >= 5


@pytest.mark.parametrize("kind", ["deleted", "empty", "cut", "longer"])
def test_files_that_are_not_whole_are_named(kind, folder):
    for path in _files(folder / "params"):
        content = path.read_bytes()
        path.unlink()
        if kind != "deleted":
            wrong = {"empty": b"", "cut": content[:-1], "longer": content + b"a"}[kind]
            path.write_bytes(wrong)
            if wrong == content:
                continue
        with pytest.raises(UserError, match=f"{path.name}.*is damaged|no complete parameters") as e:
            restore(folder)
        assert "\n" not in str(e.value)
        path.write_bytes(content)


@pytest.mark.parametrize("kind", ["flipped", "deleted"])
def test_a_finished_run_whose_model_is_damaged_says_so(kind, folder):
    """And not that its model is there."""
    folder.with_name("model.json").write_text('{"step": 4}\n')
    finish = lambda: replace_result(folder, 4, pytest.fail, check_model)
    finish()
    for path in _files(folder / "params"):
        content = path.read_bytes()
        if not content:
            continue
        path.unlink()
        if kind == "flipped":
            path.write_bytes(content)
            _flipped(path, random.Random(0))
        with pytest.raises(UserError, match=r"damaged|no complete") as raised:
            finish()
        assert str(raised.value).endswith(f"remove {folder}, and the same command writes it again")
        path.write_bytes(content)


def test_a_folder_without_checksums_is_refused(folder):
    (folder / CHECKSUMS_FILE).unlink()
    with pytest.raises(DamageError, match=rf"model/{CHECKSUMS_FILE} is damaged: it is missing"):
        restore(folder)


@pytest.mark.parametrize(
    "content",
    [
        "", "[" * 100_000, '{"files": [], "chunks": {}}',
        '{"files": {"a": [1e999, 1]}, "chunks": {}}',
        '{"files": {"a\\u0000b": [1, 1]}, "chunks": {}}',
    ],
)  # fmt: skip
def test_a_list_of_checksums_of_another_kind(content, folder):
    (folder / CHECKSUMS_FILE).write_text(content)
    with pytest.raises(DamageError, match="is damaged"):
        restore(folder)


@pytest.mark.parametrize("sums", [None, "CRC-64"])
def test_a_folder_of_another_version_is_not_called_damaged(sums, folder, monkeypatch):
    """Whose chunks have other checksums."""
    for name in ("params/embedding", "."):
        written = [path for path in (folder / name).rglob("*") if path.is_file()]
        chunks = json.loads((folder / name / CHECKSUMS_FILE).read_text())["chunks"]
        monkeypatch.setattr(checksums, "_CHUNK_SUMS", sums)
        checksums.write_checksums(folder / name, written, chunks)
        monkeypatch.undo()
    with pytest.raises(UserError, match="embedding was written by another version") as refused:
        restore(folder)
    assert not isinstance(refused.value, DamageError)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_what_cannot_be_read_is_one_line(folder, monkeypatch):
    """Of files that are too large to be checked before."""
    monkeypatch.setattr(checksums, "_change", lambda *_: None)
    for path in _files(folder / "params"):
        content = path.read_bytes()
        for wrong in (b"", content[: len(content) // 2]):
            path.write_bytes(wrong)
            with contextlib.suppress(UserError):
                restore(folder)
        path.write_bytes(content)


def test_slices_that_cut_chunks_are_checked(written, tmp_path, monkeypatch):
    monkeypatch.setattr(parameter_files, "_CHUNK_BYTES", 600)
    folder = tmp_path / "model"
    save_model(folder, CONFIG, written[1])
    mesh = make_mesh((1, 4, 2), jax.devices()[:8])
    _assert_equal(restore(folder, mesh)[1], written[1])
    path = max(_files(folder / "params"), key=lambda path: path.stat().st_size)
    monkeypatch.setattr(checksums, "_SMALL_BYTES", -1)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(DamageError):
        restore(folder, mesh)


CONFIGS = {
    "text": "model",
    "nothing": "",
    "a list": "[]",
    "a number": "7",
    "deep": "[" * 100_000,
    "not UTF-8": b"\xff\xfe{}",
    "huge sizes": {"hidden_size": 10**18, "vocab_size": 10**18, "inner_hidden_size": 10**18},
    "many layers": {"num_layers": 10**18},
    "NaN": {"layernorm_epsilon": float("nan")},
    "special tokens of another kind": {"special_tokens": 7},
    "a long name": {"a" * 10**6: 1},
    "a number of many digits": '{"num_layers": ' + "1" * 5000 + "}",
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_of_another_kind_is_one_line(kind, folder):
    content, file = CONFIGS[kind], folder / "config.json"
    if isinstance(content, dict):
        content = json.dumps(json.loads(file.read_text()) | content)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as refused:
        restore(folder)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 600


def test_a_config_that_is_a_folder(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(CheckpointError, match="Is a directory"):
        load_config(folder)


def test_a_config_that_was_edited_is_said(folder, capsys):
    file = folder / "config.json"
    changed = json.loads(file.read_text()) | {"max_sequence_length": 64}
    file.write_text(json.dumps(changed))
    assert restore(folder)[0].max_sequence_length == 64
    assert "config.json was edited, or is damaged" in capsys.readouterr().err


def test_damaged_adapters(written, tmp_path):
    adapter = AdapterConfig(rank=2)
    pairs = glm_params.init_of(adapters.specs(CONFIG, adapter), jax.random.key(0), None)
    folder = tmp_path / "adapter"
    save_adapter(folder, adapter, pairs, {"a": 1})
    load_adapter(folder, CONFIG, {"a": 1}, None)
    rng = random.Random(0)
    for path in _files(folder):
        if path == folder / CHECKSUMS_FILE:  # blanks in it do not matter
            continue
        content = path.read_bytes()
        changed = bytearray(content)
        if content:
            changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        for wrong in (changed, content[:-1], None):
            path.unlink()
            if wrong is not None:
                path.write_bytes(wrong)
            if wrong != content:
                with pytest.raises(UserError) as refused:
                    load_adapter(folder, CONFIG, {"a": 1}, None)
                assert "\n" not in str(refused.value)
            path.write_bytes(content)


@pytest.mark.parametrize("content", ["", "[]", "7", "[" * 100_000, '{"model": 7}', '{"model": {}}'])
def test_an_adapters_description_of_another_kind(content, tmp_path):
    (tmp_path / "adapter.json").write_text(content)
    checksums.write_checksums(tmp_path, [tmp_path / "adapter.json"], {})
    with pytest.raises(CheckpointError, match=r"adapter\.json"):
        load_adapter(tmp_path, CONFIG, {"a": 1}, None)


@pytest.mark.parametrize("shape", [(), (1,), (5, 3), (1, 7, 16), (3, 1, 2, 9)])
@pytest.mark.parametrize("dtype", ["int8", "float16", "float32"])
def test_a_checksum_depends_on_the_numbers_alone(shape, dtype):
    values = np.asarray(np.random.default_rng(0).integers(-99, 99, shape)).astype(dtype)
    larger = np.zeros([size + 3 for size in shape], dtype)
    inside = tuple(slice(1, size + 1) for size in shape)
    larger[inside] = values
    expected = chunk_checksum(values)
    assert chunk_checksum(larger[*inside, ...]) == expected
    for place in np.ndindex(shape):
        changed = values.copy()
        changed[place] += 1
        assert chunk_checksum(changed) != expected


@pytest.mark.parametrize("shape", [(), (1,), (40,), (5, 3), (2, 3, 7), (3, 1, 4, 9), (0, 4)])
def test_pieces_are_a_contiguous_arrays_bytes(shape, monkeypatch):
    monkeypatch.setattr(checksums, "_PIECE_BYTES", 32)
    values = np.arange(math.prod(shape), dtype=np.int16).reshape(shape)
    found = [values[(*index, ...)] for index in checksums.pieces(shape, 2)]
    assert all(piece.flags.c_contiguous and piece.nbytes <= 32 for piece in found)
    assert b"".join(piece.tobytes() for piece in found) == values.tobytes()


def test_values_of_a_store_whose_index_has_several_levels(tmp_path):
    config = {"max_decoded_node_bytes": 300, "max_inline_value_bytes": 4}
    store = {"driver": "ocdbt", "base": tmp_path.as_uri(), "config": config}
    arrays = {f"array.{i % 3}/{i}.0": np.arange(i % 9, dtype=np.uint8) for i in range(60)}
    with ts.Transaction() as transaction:
        writer = ts.KvStore.open(store).result().with_transaction(transaction)
        for key, array in arrays.items():
            writer[key] = array.tobytes()
    with contextlib.closing(StoredValues(tmp_path)) as values:
        for key, array in arrays.items():
            found = np.empty((len(array), 2), np.uint8)[:, 0]
            assert values.find(key, array).read_into(found) == chunk_checksum(array)
            np.testing.assert_array_equal(found, array)
        for key, size in [("array.0/0.1", 0), ("array.0/3.0", 4), ("array.2/8.0", 7)]:
            with pytest.raises(DamageError, match="missing, or has another size"):
                values.find(key, np.empty(size, np.uint8))


def test_chunks_that_overlap_a_region():
    chunks = Chunks((5, 4), (2, 3))
    found = dict(chunks.overlapping((slice(1, 3), slice(3, 4))))
    assert found == {
        (0, 1): (slice(0, 2), slice(3, 4)),
        (1, 1): (slice(2, 4), slice(3, 4)),
    }
    assert len(dict(chunks.overlapping((slice(0, 5), slice(0, 4))))) == 6
