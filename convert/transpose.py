"""Transpose large matrices: half of a conversion's work.

numpy moves single elements, some 0.3 GB a second, or 1 in strips. The C++ function, three
times as fast, is called without Python's lock.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any

import numpy as np

_LIBRARY = Path(__file__).with_name("libglm_jax_transpose.so")
_ROWS = 32  # of a strip


@functools.cache
def _functions() -> dict[int, Any]:
    """Return the functions by bytes of an element; none without a compiler at installation."""
    if not _LIBRARY.exists():
        return {}
    library = ctypes.CDLL(str(_LIBRARY))
    functions = {size: getattr(library, f"Transpose{size}") for size in (1, 2, 4)}
    for function in functions.values():
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        function.argtypes = [pointer, number, number, number, pointer, number]
        function.restype = None
    return functions


def transpose(source: np.ndarray, to: np.ndarray) -> None:
    """Set to [n, m] to source [m, n] transposed; both have contiguous rows and one dtype."""
    item = source.itemsize
    function = _functions().get(item)
    rows, columns = source.shape
    is_plain = (source.strides[1], to.strides[1]) == (item, item) or 1 in source.shape
    if function is None or not is_plain or source.dtype != to.dtype:
        for i in range(0, rows, _ROWS):
            to[:, i : i + _ROWS] = source[i : i + _ROWS].T
        return
    if to.shape != (columns, rows):
        raise ValueError(f"{source.shape} transposed into {to.shape}")
    function(
        source.ctypes.data,
        rows,
        columns,
        source.strides[0] // item,
        to.ctypes.data,
        to.strides[0] // item,
    )
