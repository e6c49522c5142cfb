"""Numbers that a dtype cannot hold: NaN, infinities, and what a cast would make so."""

from typing import Any

import numpy as np

from convert.errors import ConvertError

_BLOCK = 1 << 19  # what fits in a cache


def count_non_finite(values: np.ndarray) -> int:
    """How many numbers are NaN or infinite."""
    if values.dtype.kind in "iub":
        return 0
    flat = values.reshape(-1)
    count = 0
    for i in range(0, flat.size, _BLOCK):
        part = flat[i : i + _BLOCK]
        # Exponents of all ones: an order of magnitude faster than isfinite.
        if part.dtype == np.float16 and (part.view(np.uint16) & 0x7FFF).max() < 0x7C00:
            continue
        count += int(part.size - np.isfinite(part).sum())
    return count


def cast(values: Any, dtype: Any) -> np.ndarray:
    """Floats in another dtype.

    Raises:
      ConvertError: numbers that float16 cannot hold.
    """
    array = np.asarray(values)
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        narrow = array.astype(dtype)
    overflown = 0
    if narrow.dtype == np.float16:
        overflown = count_non_finite(narrow) - count_non_finite(array)
    if overflown:
        raise ConvertError(
            f"{overflown} numbers of a tensor of {list(array.shape)} are beyond float16, which "
            "was asked for, or which the released layout has: leave them in bfloat16 or float32"
        )
    return narrow
