"""PyTorch itself writes what is read here, and reads what is written."""

import zipfile

import numpy as np
import pytest
from conftest import GOLDEN, POSITIONS
from torch_files import write_torch_file

from convert.conversion import Options, convert_shards
from convert.errors import ConvertError
from convert.sat_writer import write_shards
from convert.torch_file import LazyTensor, TorchFile

torch = pytest.importorskip("torch", reason="PyTorch, the peer of these tests, is not here")

CHECKPOINTS = GOLDEN / "checkpoints"


@pytest.mark.parametrize("name", ["tp2", "int4_tp2"])
def test_written_shards_are_read_by_torch(tmp_path, name):
    convert_shards(CHECKPOINTS / name, tmp_path / "out", Options(max_sequence_length=POSITIONS))
    write_shards(tmp_path / "out", tmp_path / "back", 2)
    for rank in range(2):
        file = f"49300/mp_rank_{rank:02d}_model_states.pt"
        got = torch.load(tmp_path / "back" / file, weights_only=True)["module"]
        expected = torch.load(CHECKPOINTS / name / file, weights_only=True)["module"]
        assert got.keys() == expected.keys()
        for key, tensor in expected.items():
            assert got[key].dtype == tensor.dtype
            assert torch.equal(got[key], tensor), key


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8", "int64", "bool", "uint8"])
def test_files_of_torch_are_read_and_ours_are_read_by_torch(tmp_path, dtype):
    array = np.arange(24).reshape(4, 6).astype(dtype)
    torch.save({"module": {"a": torch.from_numpy(array)}}, tmp_path / "theirs.pt")
    np.testing.assert_array_equal(
        TorchFile(tmp_path / "theirs.pt").content["module"]["a"].read(), array
    )
    write_torch_file(tmp_path / "ours.pt", {"a": array})
    tensor = torch.load(tmp_path / "ours.pt", weights_only=True)["module"]["a"]
    np.testing.assert_array_equal(tensor.numpy(), array)
    with zipfile.ZipFile(tmp_path / "ours.pt") as archive:
        assert archive.testzip() is None


def test_views_of_torch_are_read(tmp_path):
    """Transposed, offset, expanded, empty and scalar tensors, bfloat16 among them."""
    base = torch.arange(30, dtype=torch.bfloat16).reshape(5, 6)
    tensors = {
        "transposed": base.T,
        "offset": base[2:, 3:],
        "expanded": base[:, :1].expand(5, 4),
        "scalar": base[1, 1],
        "empty": base[:0],
    }
    torch.save({"module": tensors}, tmp_path / "a.pt")
    module = TorchFile(tmp_path / "a.pt").content["module"]
    for name, tensor in tensors.items():
        got = module[name].read()
        assert got.shape == tuple(tensor.shape)
        np.testing.assert_array_equal(got.astype(np.float32), tensor.float().numpy())


def test_what_torch_leaves_beside_the_weights_is_passed_over(tmp_path):
    weight = torch.arange(6.0).reshape(2, 3)
    parameter, tagged = torch.nn.Parameter(weight.T.clone()), weight.clone()
    parameter.model_parallel = tagged.model_parallel = True
    optimizer = torch.optim.Adam([parameter])
    beside = [
        torch.Size([1, 2]), torch.float16, torch.device("cpu"), torch.get_rng_state(),
        torch.ones(3, dtype=torch.complex64), torch.ones(2, dtype=torch.uint16),
        torch.sparse_coo_tensor([[0]], [1.0], (3,), check_invariants=True), torch.nn.Linear(2, 2),
        optimizer.state_dict(), torch.ones(3)._neg_view(),
    ]  # fmt: skip
    module = {"w": weight, "parameter": parameter, "tagged": tagged, "turned": weight.T}
    torch.save({"beside": beside, "module": module, "n": 1}, tmp_path / "a.pt")
    content = TorchFile(tmp_path / "a.pt").content
    assert (content["n"], len(content["beside"])) == (1, len(beside))
    assert not isinstance(content["beside"][-1], LazyTensor)  # its numbers are not those stored
    for name, tensor in module.items():
        expected = tensor.detach().numpy()
        np.testing.assert_array_equal(content["module"][name].read(), expected, err_msg=name)


def test_torchs_older_format_is_named(tmp_path):
    tensors = {"module": {"w": torch.ones(3)}}
    torch.save(tensors, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ConvertError, match=r"before 1\.6"):
        TorchFile(tmp_path / "a.pt")
