"""How to quantise, as one value for flags and configs."""

import dataclasses

from glm_jax.quantization.formats import QuantizationError, WeightFormat


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How float weights become integers.

    Attributes:
      bits: 8 or 4.
      group_size: inputs that share a scale: 32, 64 or 128, or None for all of a row.
      zero_point: whether a group's range may lie off centre; otherwise it is symmetric.
      search: whether each group's range shrinks to where the squared error is least; otherwise
        it reaches to the greatest magnitude, as the original's does.
    """

    bits: int
    group_size: int | None = None
    zero_point: bool = False
    search: bool = True

    def __post_init__(self) -> None:
        if self.bits not in (8, 4):
            raise QuantizationError(f"bits={self.bits}: weights are quantised to 8 or 4 bits")
        _ = self.format  # which checks the group size

    @property
    def format(self) -> WeightFormat:
        """The format of kernels that are quantised in this way."""
        return WeightFormat(f"int{self.bits}", self.group_size, 1, self.zero_point)

    @classmethod
    def parse(cls, text: str) -> "Scheme":
        """Parse a format's name such as "int4-g128", or "int8" or "int4" with options after commas.

        Options: "group=64"; "zero_point"; "max", which skips the search, for the original's scales.

        Raises:
          QuantizationError: the text is neither.
        """
        first, *options = (part.strip() for part in text.split(","))
        stored = WeightFormat.parse(first) if first.startswith(("int8", "int4")) else None
        if stored is None or stored.shards > 1:
            raise QuantizationError(f"quantization={text!r}: begin with int8 or int4")
        scheme = cls(stored.bits, stored.group_size, stored.zero_point)
        for option in options:
            name, _, value = option.partition("=")
            if option == "max":
                scheme = dataclasses.replace(scheme, search=False)
            elif option == "zero_point":
                scheme = dataclasses.replace(scheme, zero_point=True)
            elif name == "group" and value.isdigit():
                scheme = dataclasses.replace(scheme, group_size=int(value))
            else:
                raise QuantizationError(
                    f"quantization={text!r}: {option!r} is none of group=N, zero_point, max"
                )
        return scheme
