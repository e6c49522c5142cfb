"""Reading and summing at once, in C++ and in NumPy."""

import zlib

import numpy as np
import pytest

from glm_jax.checkpoints import summed_read
from glm_jax.checkpoints.checksums import piece_checksum


@pytest.fixture(params=["C++", "NumPy"])
def implementation(request, monkeypatch):
    if request.param == "NumPy":
        monkeypatch.setattr(summed_read, "_function", lambda: None)
    elif summed_read._function() is None:
        pytest.skip("its library is not built: there was no C++ compiler")


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 131072, 131073, 400_001, 3 << 20])
def test_what_is_read_and_its_sums(tmp_path, size):
    content = np.random.default_rng(size).integers(0, 256, size + 7, np.uint8)
    (tmp_path / "file").write_bytes(content.tobytes())
    target = np.zeros(size, np.uint8)
    with (tmp_path / "file").open("rb") as file:
        sums = summed_read.read_summed(file.fileno(), 7, target)
        with pytest.raises(EOFError):
            summed_read.read_summed(file.fileno(), 8, np.zeros(size + 1, np.uint8))
    np.testing.assert_array_equal(target, content[7:])
    blocks = [content[7 + i * 4096 :][:4096].tobytes() for i in range(size // 4096)]
    words = [int.from_bytes(b[i : i + 8], "little") for b in blocks[:2] for i in range(0, 4096, 8)]
    expected = [sum(words[i : i + 512]) % 2**64 for i in range(0, len(words), 512)]
    assert sums[:2].tolist() == expected
    np.testing.assert_array_equal(sums, summed_read.block_sums(content[7:]))
    rest = content[7 + size // 4096 * 4096 :].tobytes()
    assert piece_checksum(target, 5, sums) == zlib.crc32(sums.tobytes() + rest, 5)


@pytest.mark.usefixtures("implementation")
def test_what_cannot_be_read(tmp_path):
    with (tmp_path / "file").open("wb") as file, pytest.raises(OSError, match="Bad file"):
        summed_read.read_summed(file.fileno(), 0, np.zeros(10, np.uint8))
