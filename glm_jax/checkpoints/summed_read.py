"""Read from a file and sum what was read at once, while the processor's cache has it.

The C++ function takes some 7% longer than reading alone, NumPy's sums of 2 MiB at a time 16%.
"""

import ctypes
import functools
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

SUMMED_BYTES = 1 << 12
_LIBRARY = Path(__file__).with_name("libglm_jax_summed_read.so")


def block_sums(content: np.ndarray) -> np.ndarray:
    """Return the sum of the 64-bit words of each whole 4 KiB, modulo 2^64.

    `np.einsum` takes 0.7 of the time of `np.sum`.

    Args:
      content: [bytes] uint8, contiguous.
    """
    end = len(content) // SUMMED_BYTES * SUMMED_BYTES
    return np.einsum("ij->i", content[:end].view("<u8").reshape(-1, SUMMED_BYTES // 8))


def read_summed(file: int, offset: int, target: np.ndarray) -> np.ndarray:
    """Fill an array with bytes of a file; return their `block_sums`.

    Args:
      file: its descriptor.
      target: [bytes] uint8, contiguous.

    Raises:
      EOFError: the file ends before.
      OSError: it cannot be read.
    """
    function = _function()
    if function is None:
        done = 0
        while done < len(target):
            count = os.preadv(file, [target[done:].data], offset + done)
            if count == 0:
                raise EOFError
            done += count
        return block_sums(target)
    sums = np.empty(len(target) // SUMMED_BYTES, np.uint64)
    count = function(file, offset, target.ctypes.data, len(target), SUMMED_BYTES, sums.ctypes.data)
    if count < 0:
        raise OSError(-count, os.strerror(-count))
    if count < len(target):
        raise EOFError
    return sums


@functools.cache
def _function() -> Any:
    """Return the C++ function; None without a compiler at installation."""
    if not _LIBRARY.exists() or sys.byteorder != "little":
        return None
    function = ctypes.CDLL(str(_LIBRARY)).ReadSummed
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [ctypes.c_int, number, pointer, number, number, pointer]
    function.restype = number
    return function
