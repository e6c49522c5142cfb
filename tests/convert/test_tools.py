"""Exports, and the tools that compare and show: every form is read as the same model."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import GOLDEN, POSITIONS
from forked import Try, run_all
from running import environment
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch_files import read_module, write_torch_file

from convert import inspect as inspect_tool
from convert import sat_layout, transpose
from convert.conversion import Options, convert_shards
from convert.errors import ConvertError
from convert.model_readers import open_model, open_plainly
from convert.orbax_to_safetensors import export
from convert.sat_reader import SatCheckpoint
from convert.sat_writer import write_shards
from convert.verify import compare
from glm_jax import save_model
from glm_jax.checkpoints import model_folder, parameter_files
from glm_jax.errors import UserError

CHECKPOINTS = GOLDEN / "checkpoints"


@pytest.fixture
def converted(tmp_path):
    convert_shards(CHECKPOINTS / "tp2", tmp_path / "model", Options(max_sequence_length=POSITIONS))
    return tmp_path / "model"


def _differences(a, b):
    found = list(compare(open_plainly(a), open_plainly(b)))
    return len(found), [d for d in found if d is not None]


@pytest.mark.parametrize("most_bytes", [10_000, 10**9])
def test_safetensors_hold_the_released_tensors(converted, tmp_path, most_bytes):
    export(converted, tmp_path / "st", most_bytes)
    index = json.loads((tmp_path / "st" / "model.safetensors.index.json").read_text())
    module = read_module(CHECKPOINTS / "tp1" / "49300" / "mp_rank_00_model_states.pt")
    expected = {name: x for name, x in module.items() if not name.endswith("inv_freq")}
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    files = set(index["weight_map"].values())
    assert (len(files) == 1) == (most_bytes > 10**8)
    assert {p.name for p in (tmp_path / "st").glob("*.safetensors")} == files
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "st" / file, "np") as tensors:
            np.testing.assert_array_equal(tensors.get_tensor(name), expected[name], err_msg=name)
    assert _differences(tmp_path / "st", CHECKPOINTS / "tp4") == (39, [])
    _, rows, _ = inspect_tool.describe(str(tmp_path / "st"), None)
    assert {name: shape for name, shape, _ in rows} == {
        n: tuple(t.shape) for n, t in expected.items()
    }


_EMBEDDING = "transformer.word_embeddings.weight"


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        (_EMBEDDING, lambda x: np.where(x == x.max(), 1e6, x), "1 numbers .* beyond float16"),
        (
            "transformer.layers.1.attention.dense.weight",
            lambda x: np.where(x == x.max(), 1e6, x),
            "1 numbers .* beyond float16",
        ),
        (_EMBEDDING, lambda x: x.astype(np.int32), "has int32, no floats"),
    ],
)
def test_safetensors_of_another_program_that_its_config_cannot_hold(
    converted, tmp_path, name, wrong, message
):
    """In a wider dtype than the model's they are cast; what would be infinite is refused."""
    export(converted, tmp_path / "st", 10**9)
    [file] = (tmp_path / "st").glob("*.safetensors")
    (tmp_path / "st" / "checksums.json").unlink()
    wide = {name: x.astype(np.float32) for name, x in load_file(file).items()}
    save_file(wide, file)
    assert _differences(tmp_path / "st", converted) == (39, [])
    save_file(wide | {name: wrong(wide[name])}, file)
    with pytest.raises(ConvertError, match=rf"{file.name}: {name}:? {message}"):
        write_shards(tmp_path / "st", tmp_path / "shards", 1)
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize("other", ["tp1", "tp8"])
def test_equal_models_are_equal_in_any_form(converted, other):
    assert _differences(converted, CHECKPOINTS / other) == (39, [])


def test_quantised_models_are_compared_by_what_they_stand_for(converted, tmp_path):
    options = Options(max_sequence_length=POSITIONS)
    convert_shards(CHECKPOINTS / "int8_tp2", tmp_path / "int8", options)
    assert _differences(tmp_path / "int8", CHECKPOINTS / "int8_tp2") == (39, [])
    count, found = _differences(converted, tmp_path / "int8")
    assert (count, len(found)) == (39, 12)  # four linears of three layers
    largest = max(np.abs(x).max() for x in jax.tree.leaves(next(open_model(converted).layers())))
    assert all(0 < d.greatest < largest / 127 for d in found)


def test_a_difference_is_found_measured_and_named(tmp_path):
    path = tmp_path / "49300" / "mp_rank_00_model_states.pt"
    path.parent.mkdir()
    source = SatCheckpoint(CHECKPOINTS / "tp1")
    module = {name: source.tensor(name).read() for name in source.names}
    name = f"{sat_layout.linear_name(1, 'dense')}.weight"
    module[name][5, 7] += np.float16(0.5)
    module["transformer.layers.0.attention.rotary_emb.inv_freq"] = np.ones(4, np.float16)
    write_torch_file(path, module)
    _, found = _differences(tmp_path, CHECKPOINTS / "tp2")
    assert [d.name for d in found] == ["layers.1.dense.kernel"]
    assert found[0].numbers == 1
    assert found[0].greatest == pytest.approx(0.5, abs=1e-3)


def test_command_lines(converted, tmp_path):
    converting = [
        ("convert.sat_to_orbax", f"--input={CHECKPOINTS / name}", f"--output={tmp_path / name}")
        for name in ("tp2", "int4_tp2")
    ]
    others = [
        ("convert.verify", converted, CHECKPOINTS / "tp8"),
        ("convert.verify", converted, CHECKPOINTS / "int4_tp8"),
        ("convert.verify",),
        ("convert.inspect", CHECKPOINTS / "int8_tp2"),
        ("convert.inspect", tmp_path / "nothing"),
    ]
    tries = [Try(tuple(map(str, command)), str(tmp_path)) for command in converting + others]
    *made, equal, other, without, shown, nothing = run_all(tries, environment(1))
    for (status, _, complaint), name in zip(made, ("tp2", "int4_tp2"), strict=True):
        assert status == 0, complaint
        pairs = compare(open_model(tmp_path / name), open_model(CHECKPOINTS / name))
        assert all(difference is None for difference in pairs)
    assert equal[0] == 0, equal
    assert "all 39 tensors are equal" in equal[1]
    assert other[0] == 1
    assert "12 of 39 tensors differ" in other[2]
    assert other[2].count("\n") == 1
    assert without[0] == 2
    assert shown[0] == 0, shown
    assert "released shards, 2 of them" in shown[1]
    assert "query_key_value.weight_scale" in shown[1]
    assert "186,208 parameters" in shown[1]
    assert "tensor axis has 1, 2, 4, 8 devices" in shown[1]
    assert nothing[0] == 1


def test_inspect_shows_a_model_folder(converted):
    lines, rows, config = inspect_tool.describe(str(converted), None)
    assert "model folder" in lines[0]
    kernel = "layers_00002_00003.dense_h_to_4h.kernel"
    assert (kernel, (1, 64, 2, 176), "float16") in rows
    assert inspect_tool.fitting_degrees(config) == [1, 2, 4, 8]
    # 96 heads, but 150528 / 96 and 32768 / 96 are not whole numbers.
    large = dataclasses.replace(
        config, num_heads=96, hidden_size=12288, inner_hidden_size=32768, vocab_size=150528
    )
    assert inspect_tool.fitting_degrees(large) == [1, 2, 4, 8, 16, 32]


def test_models_with_learned_positions_are_read_and_not_run(tmp_path):
    """Names of GLM-10B, GLM-2B and GLM-large."""
    hidden, folder = 16, tmp_path / "in"
    folder.mkdir()
    shapes = {
        "word_embeddings.weight": (50, hidden),
        "transformer.position_embeddings.weight": (33, hidden),
        "transformer.block_position_embeddings.weight": (33, hidden),
        "transformer.layers.0.attention.query_key_value.weight": (3 * hidden // 2, hidden),
        "transformer.layers.0.mlp.dense_h_to_4h.weight": (2 * hidden, hidden),
    }
    for rank in range(2):
        module = {name: np.ones(shape, np.float16) for name, shape in shapes.items()}
        write_torch_file(folder / f"mp_rank_{rank:02d}_model_states.pt", module)
    lines, rows, config = inspect_tool.describe(str(folder), None)
    assert config is None
    assert "cannot be run" in lines[-1]
    merged = {name: shape for name, shape, _ in rows}
    assert merged["word_embeddings.weight"] == (100, hidden)
    assert merged["transformer.layers.0.attention.query_key_value.weight"] == (3 * hidden, hidden)
    assert merged["transformer.position_embeddings.weight"] == (33, hidden)
    with pytest.raises(ConvertError, match=r"learned block positions.*cannot run"):
        convert_shards(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_large_model_is_saved_in_several_parts(tmp_path, tiny_model, monkeypatch):
    config, params = tiny_model
    monkeypatch.setattr(model_folder, "_PART_BYTES", 1)
    save_model(tmp_path / "model", config, params)
    names = {p.name for p in (tmp_path / "model" / "params").iterdir()}
    assert names == {
        parameter_files.EMBEDDING,
        parameter_files.layers_part(0, 1),
        parameter_files.layers_part(1, 2),
    }
    _, restored = model_folder.restore(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, restored, params)
    (tmp_path / "model" / "params" / parameter_files.layers_part(0, 1)).rename(tmp_path / "aside")
    with pytest.raises(UserError, match=r"of 2 layers \(no part begins with layer 0\)"):
        model_folder.restore(tmp_path / "model")


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 1), (8, 32), (67, 129), (320, 40)])
def test_transposes(shape, dtype):
    wide = np.arange(shape[0] * (shape[1] + 5)).reshape(shape[0], -1).astype(dtype)
    source = wide[:, 3 : 3 + shape[1]]
    to = np.zeros((shape[1], shape[0] + 7), dtype)
    transpose.transpose(source, to[:, 2 : 2 + shape[0]])
    np.testing.assert_array_equal(to[:, 2 : 2 + shape[0]], source.T)
    assert not to[:, :2].any()
    assert not to[:, 2 + shape[0] :].any()
