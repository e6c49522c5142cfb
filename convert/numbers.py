"""Numbers that a dtype cannot hold: NaN, infinities, and what a cast would make so."""

from typing import Any

import ml_dtypes
import numpy as np

from convert.errors import ConvertError

_WIDER = {
    "float16": "leave them in bfloat16 or float32",
    "bfloat16": "leave them in float32",
    "float32": "they are no weights that a model can have",
}
_BLOCK = 1 << 19  # what fits in a cache


def count_non_finite(values: np.ndarray) -> int:
    """Count the numbers that are NaN or infinite."""
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


def differing(a: np.ndarray, b: np.ndarray) -> tuple[int, float]:
    """Count the numbers that differ, and return the greatest difference. NaN equals NaN."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    is_different = ~((a == b) | (np.isnan(a) & np.isnan(b)))
    if not is_different.any():
        return 0, 0.0
    gap = np.abs(a - b)[is_different]
    return gap.size, float(np.where(np.isnan(gap), np.inf, gap).max())


def cast(values: Any, dtype: Any) -> np.ndarray:
    """Return floats in another dtype.

    Raises:
      ConvertError: numbers that are beyond its range.
    """
    array = np.asarray(values)
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    overflowed = 0
    if ml_dtypes.finfo(result.dtype).max < ml_dtypes.finfo(array.dtype).max:
        overflowed = count_non_finite(result) - count_non_finite(array)
    if overflowed:
        raise ConvertError(
            f"{overflowed} numbers of a tensor of {list(array.shape)} are beyond {result.dtype}, "
            f"which was asked for, or which the released layout has: {_WIDER[str(result.dtype)]}"
        )
    return result
