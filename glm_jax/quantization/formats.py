"""The named formats of a model's kernels, as `config.json` holds them.

A name is a dtype of `BITS`; for integers, optionally, which inputs share a scale ("-g128": groups
of 128; "-s8": an eighth of the inputs, in linears whose inputs released shards divide; neither: all
of a row); and "-zp" for zero points. So "float16", "int8", "int4-g128-zp", "int4-s8".
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from glm_jax.errors import UserError, shown

GROUP_SIZES = (32, 64, 128)
BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "int8": 8, "int4": 4}
_NAME = re.compile(r"(\w+?)(?:-g(\d{1,4})|-s([1-9]\d{0,3}))?(-zp)?")


class QuantizationError(UserError):
    """A weight that cannot be quantised in the requested way."""


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """How the kernels of a model are stored; embedding, norms and biases are always floats.

    Attributes:
      dtype: one of `BITS`.
      group_size: neighbouring inputs that share a scale, one of `GROUP_SIZES`; None for all.
      shards: equal parts of the inputs with a scale each, of linears whose inputs released
        shards divided among them.
      zero_point: whether a group's range may lie off centre.
    """

    dtype: str
    group_size: int | None = None
    shards: int = 1
    zero_point: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in BITS:
            raise QuantizationError(
                f"weight format {shown(self.dtype)}: expected one of {', '.join(BITS)}"
            )
        if self.group_size not in (None, *GROUP_SIZES):
            raise QuantizationError(
                f"group size {self.group_size}: one of {GROUP_SIZES}, or none for whole rows"
            )

    @property
    def is_quantized(self) -> bool:
        return self.dtype.startswith("int")

    @property
    def bits(self) -> int:
        return BITS[self.dtype]

    @property
    def name(self) -> str:
        group = "" if self.group_size is None else f"-g{self.group_size}"
        shards = "" if self.shards == 1 else f"-s{self.shards}"
        return f"{self.dtype}{group}{shards}{'-zp' if self.zero_point else ''}"

    @classmethod
    def parse(cls, name: Any) -> "WeightFormat":
        """Parse a name; the inverse of `name`.

        Raises:
          QuantizationError: there is no such format.
        """
        match = _NAME.fullmatch(name) if isinstance(name, str) else None
        if match is None:
            raise QuantizationError(f"weight format {shown(name)}: expected such as int4-g128")
        dtype, group, shards, zero_point = match.groups()
        parsed = cls(dtype, int(group) if group else None, int(shards or 1), bool(zero_point))
        if parsed.name != name or (not parsed.is_quantized and name != dtype):
            raise QuantizationError(f"weight format {shown(name)}: expected such as int4-g128")
        return parsed

    def groups(self, inputs: int, is_row_parallel: bool) -> int:
        """Count the groups that the inputs of a kernel divide into.

        Args:
          is_row_parallel: whether released shards divide the kernel's inputs among them.

        Raises:
          QuantizationError: the inputs do not divide into groups (and, of 4 bits, into pairs).
        """
        parts = self.shards if is_row_parallel else 1
        size = self.group_size or inputs // parts
        if inputs % size or (self.dtype == "int4" and size % 2):
            pairs = " made of pairs, as 4 bits need" if self.dtype == "int4" else ""
            raise QuantizationError(f"{inputs} inputs do not divide into groups of {size}{pairs}")
        return inputs // size


def format_of(
    dtype: str, has_zero_points: bool, kernels: Sequence[tuple[int, bool, int]]
) -> WeightFormat | None:
    """Return the format of quantised kernels that are in memory; None where none describes them.

    Args:
      dtype: one of `BITS`.
      kernels: of each its inputs, whether it is row-parallel, and its groups.
    """
    shards = (groups for _, is_row_parallel, groups in kernels if is_row_parallel)
    possible = [WeightFormat(dtype, None, count, has_zero_points) for count in (1, *shards)]
    possible += [WeightFormat(dtype, size, 1, has_zero_points) for size in GROUP_SIZES]

    def describes(candidate: WeightFormat) -> bool:
        try:
            return all(candidate.groups(size, is_row) == n for size, is_row, n in kernels)
        except QuantizationError:
            return False

    return next(filter(describes, possible), None)
