"""Released shards to Orbax and back, and every kind of input that must be refused."""

import json
import pickle
import shutil
import zipfile

import jax
import numpy as np
import pytest
from conftest import GOLDEN, POSITIONS, load_golden
from torch_files import read_module, write_torch_file

from convert.conversion import Options, convert_shards
from convert.errors import ConvertError
from convert.sat_reader import SatCheckpoint
from convert.sat_source import find_shards
from convert.sat_writer import write_shards
from convert.torch_file import TorchFile
from glm_jax import restore
from glm_jax.checkpoints.model_folder import CheckpointError
from glm_jax.files import OutputError
from glm_jax.model.params import quantize_params
from glm_jax.quantization import QuantizationError, QuantizedArray, Scheme

CHECKPOINTS = GOLDEN / "checkpoints"
SHARD = "49300/mp_rank_01_model_states.pt"


@pytest.fixture
def copy(tmp_path):
    """A copy of a two-shard checkpoint to break."""
    shutil.copytree(CHECKPOINTS / "tp2", tmp_path / "in")
    return tmp_path / "in"


def _convert(source, tmp_path):
    convert_shards(source, tmp_path / "out", Options(max_sequence_length=POSITIONS))


def _assert_nothing_written(tmp_path):
    assert [p.name for p in tmp_path.iterdir() if p.name != "in"] == []


def _rewrite(path, change):
    """Saves a shard again with its module changed."""
    module = read_module(path)
    change(module)
    path.unlink()
    write_torch_file(path, module)


@pytest.mark.gpu
@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_every_shard_count_gives_the_same_model(tmp_path, shards):
    _convert(CHECKPOINTS / f"tp{shards}", tmp_path)
    config, params = restore(tmp_path / "out")
    expected_config, expected = load_golden("tp1", "float16")
    assert config == expected_config
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_the_iterations_folder_itself_is_taken(tmp_path):
    _convert(CHECKPOINTS / "tp2" / "49300", tmp_path)
    _, expected = load_golden("tp1", "float16")
    jax.tree.map(np.testing.assert_array_equal, restore(tmp_path / "out")[1], expected)


@pytest.mark.parametrize("latest", [" 49300\n\n", '"49300"', "'49300' \r\n", None])
def test_latest_with_stray_blanks_or_quotes_is_taken(copy, latest):
    if latest is None:
        (copy / "latest").unlink()  # one iteration needs none
    else:
        (copy / "latest").write_text(latest)
    assert len(find_shards(copy)) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["int8_tp1", "int8_tp8", "int4_tp2", "int4_tp8"])
def test_quantized_shards_keep_their_integers(tmp_path, name):
    _convert(CHECKPOINTS / name, tmp_path)
    config, params = restore(tmp_path / "out")
    expected_config, expected = load_golden(name, "float16")
    assert config == expected_config
    kernel = params.layers.dense.kernel
    assert isinstance(kernel, QuantizedArray)
    assert (kernel.bits, kernel.groups) == (int(name[3]), int(name[-1]))
    assert params.layers.query_key_value.kernel.groups == 1
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize(
    ("name", "source"),
    [(name, "tp1") for name in ("tp1", "tp2", "tp4", "tp8", "int8_tp8", "int4_tp2")]
    + [(name, "the same") for name in ("tp8", "int8_tp1", "int8_tp8", "int4_tp2", "int4_tp8")],
)
def test_written_shards_equal_the_originals_to_the_byte(tmp_path, name, source):
    """Each tensor's bytes, dtype and shape are the oracle's.

    Quantised shards come from float weights, or from integers that were converted.
    """
    shards, quantization = int(name[-1]), name[:4] if name.startswith("int") else None
    is_same = source == "the same"
    _convert(CHECKPOINTS / (name if is_same else source), tmp_path)
    quantization = None if is_same else quantization
    write_shards(tmp_path / "out", tmp_path / "back", shards, quantization=quantization)
    assert (tmp_path / "back" / "latest").read_text() == "49300"
    for rank in range(shards):
        file = f"49300/mp_rank_{rank:02d}_model_states.pt"
        got, expected = (
            {name: (x.shape, x.dtype, x.tobytes()) for name, x in read_module(path / file).items()}
            for path in (tmp_path / "back", CHECKPOINTS / name)
        )
        assert got == expected


def test_restored_in_another_dtype_or_quantised(tmp_path):
    _convert(CHECKPOINTS / "tp2", tmp_path)
    config, params = restore(tmp_path / "out", dtype="bfloat16")
    assert (config.compute_dtype, config.param_dtype) == ("bfloat16", "bfloat16")
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"bfloat16"}
    _, quantized = restore(tmp_path / "out", quantization="int4,max")
    _, expected = load_golden("int4_tp1", "float16")
    jax.tree.map(np.testing.assert_array_equal, quantized, expected)


def test_a_quantised_model_is_not_quantised_otherwise(tmp_path):
    _convert(CHECKPOINTS / "int8_tp2", tmp_path)
    restore(tmp_path / "out", quantization="int8")
    with pytest.raises(CheckpointError, match="int8-s2 already"):
        restore(tmp_path / "out", quantization="int4")
    with pytest.raises(QuantizationError, match="begin with int8 or int4"):
        restore(tmp_path / "out", quantization="int2")
    with pytest.raises(ConvertError, match="quantised in 2 groups of inputs; 4 shards"):
        write_shards(tmp_path / "out", tmp_path / "back", 4)
    assert not (tmp_path / "back").exists()


def test_missing_shard(copy, tmp_path):
    (copy / "49300/mp_rank_00_model_states.pt").unlink()
    with pytest.raises(ConvertError, match=r"mp_rank_00_model_states\.pt is missing"):
        _convert(copy, tmp_path)
    _assert_nothing_written(tmp_path)


@pytest.mark.parametrize("kept", [0, 10, 5_000, -1_000, -1])
def test_truncated_shard(copy, tmp_path, kept):
    data = (copy / SHARD).read_bytes()
    (copy / SHARD).write_bytes(data[:kept])
    with pytest.raises(ConvertError, match=r"mp_rank_01.* (truncated|is empty)"):
        _convert(copy, tmp_path)
    _assert_nothing_written(tmp_path)


def test_shards_of_different_shapes(copy, tmp_path):
    def widen(module):
        name = "transformer.layers.1.attention.dense.weight"
        module[name] = np.concatenate([module[name]] * 2, axis=1)

    _rewrite(copy / SHARD, widen)
    with pytest.raises(ConvertError, match=r"dense\.weight is float16 \(64, 64\), in .*mp_rank_00"):
        _convert(copy, tmp_path)
    _assert_nothing_written(tmp_path)


def test_shards_with_different_tensors(copy, tmp_path):
    _rewrite(copy / SHARD, lambda module: module.pop("transformer.final_layernorm.bias"))
    with pytest.raises(ConvertError, match=r"only one has transformer\.final_layernorm\.bias"):
        _convert(copy, tmp_path)


@pytest.mark.parametrize("heads", [5, 7, 128])
def test_shapes_that_do_not_divide_by_the_heads(tmp_path, heads):
    with pytest.raises(ConvertError, match=f"do not divide by {heads} heads"):
        convert_shards(CHECKPOINTS / "tp2", tmp_path / "out", Options(num_heads=heads))
    _assert_nothing_written(tmp_path)


class _Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return print, (f"ran {self.marker}",), None


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(copy, tmp_path, capsys, protocol):
    with zipfile.ZipFile(copy / SHARD, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({"module": _Evil("me")}, protocol))
    with pytest.raises(ConvertError, match=r"asks for (builtins|__builtin__)\.print"):
        _convert(copy, tmp_path)
    assert capsys.readouterr().out == ""
    _assert_nothing_written(tmp_path)


def test_a_tensor_that_reaches_past_its_storage_is_refused(tmp_path):
    write_torch_file(tmp_path / "a.pt", {"x": np.zeros((4, 4), np.float32)})
    data = (tmp_path / "a.pt").read_bytes()
    shape = b"(J\x04\x00\x00\x00J\x04\x00\x00\x00t"
    assert data.count(shape) == 1
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    entries["a/data.pkl"] = entries["a/data.pkl"].replace(shape, b"(J\x05" + shape[3:])
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.raises(ConvertError, match="reaches element 19 of a storage of 16"):
        TorchFile(tmp_path / "b.pt")


def test_a_storage_shorter_than_its_tensors_is_refused(tmp_path):
    write_torch_file(tmp_path / "a.pt", {"x": np.zeros((4, 4), np.float32)})
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content[:12] if name.startswith("a/data/") else content)
    tensor = TorchFile(tmp_path / "b.pt").content["module"]["x"]
    with pytest.raises(ConvertError, match="holds 12 bytes, its tensors need 64"):
        tensor.read()


def test_a_non_empty_output_is_refused_and_kept(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match="is not empty"):
        _convert(CHECKPOINTS / "tp2", tmp_path)
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize(
    ("latest", "message"), [("77", r"names '77'.*there is 49300"), (" ''\n", "names ''")]
)
def test_a_latest_that_leads_nowhere(copy, tmp_path, latest, message):
    (copy / "latest").write_text(latest)
    with pytest.raises(ConvertError, match=message):
        _convert(copy, tmp_path)


def test_shards_that_do_not_divide(tmp_path):
    _convert(CHECKPOINTS / "tp2", tmp_path)
    for shards, message in ((3, "do not divide into 3 shards"), (0, "at least 1")):
        with pytest.raises(ConvertError, match=message):
            write_shards(tmp_path / "out", tmp_path / "back", shards)
        assert not (tmp_path / "back").exists()


def test_a_half_written_model_is_never_restored(tmp_path):
    _convert(CHECKPOINTS / "tp2", tmp_path)
    partial = tmp_path / "half"
    shutil.copytree(tmp_path / "out", partial)
    (partial / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        restore(partial)
    shutil.copy(tmp_path / "out" / "config.json", partial)
    shutil.rmtree(partial / "params")
    with pytest.raises(CheckpointError, match="no complete parameters"):
        restore(partial)


def test_a_config_that_does_not_fit_the_parameters_is_refused(tmp_path):
    _convert(CHECKPOINTS / "tp2", tmp_path)
    file = tmp_path / "out" / "config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps(fields | {"vocab_size": 1024}))
    with pytest.raises(CheckpointError, match=r"word_embeddings is \(512, 64\).*\(1024, 64\)"):
        restore(tmp_path / "out")


def test_reading_is_lazy_and_damage_is_found(copy):
    """Opening a checkpoint touches no storage: damage is found when a tensor is read."""
    data = bytearray((copy / SHARD).read_bytes())
    start = data.index(b"data/3FB")
    data[start + 200 : start + 210] = b"\xff" * 10
    (copy / SHARD).write_bytes(bytes(data))
    checkpoint = SatCheckpoint(copy)
    name = "transformer.layers.0.attention.query_key_value.weight"
    with pytest.raises(ConvertError, match=r"mp_rank_01.*data/3 is damaged"):
        checkpoint.tensor(name, rank=1).read()
    assert np.isnan(SatCheckpoint(copy, is_checked=False).tensor(name, rank=1).read()).any()
    assert not np.isnan(checkpoint.tensor(name, rank=0).read()).any()


def test_quantizing_what_was_converted_gives_the_originals(tmp_path):
    _convert(CHECKPOINTS / "tp8", tmp_path)
    _, params = restore(tmp_path / "out")
    _, expected = load_golden("int8_tp1", "float16")
    jax.tree.map(
        np.testing.assert_array_equal, quantize_params(params, Scheme(8, search=False)), expected
    )
