"""Which backend multiplies fastest, by tables of products that were measured on a kind of device.

`glm-jax tune --measure` writes such a table, a JSON file. Those of the package are in `tables/`;
products that the folder GLM_JAX_TABLES has too are taken from there. Where nobody measured, the
op's order of preference holds, and the rules that each kernel has for its blocks.
"""

import dataclasses
import functools
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from glm_jax.errors import UserError, shown
from glm_jax.files import read_json
from glm_jax.kernels import target
from glm_jax.kernels.dispatch import Backend
from glm_jax.kernels.quantized_matmul.arguments import INTEGERS, Arguments
from glm_jax.text_files import to_json

FOLDER = "GLM_JAX_TABLES"  # environment variable
ROWS = (1, 8, 16, 32, 64, 128, 512, 2048)  # what is measured: powers of two at most 8 times apart
PACKAGED = Path(__file__).with_name("tables")
_FORMAT = 1
# What was measured with many more rows says nothing: its tiles are made for those.
_MAX_PADDING = 4


class TableError(UserError):
    """A table of measured products that cannot be used."""


@dataclasses.dataclass(frozen=True)
class Product:
    """What a table tells products apart by, beside their rows.

    Attributes:
      layout: of the weight: "stored", or the kernel that it is laid out for.
      bits, group_size, zero_points: of the weight on one device.
      inputs, outputs: K and N on one device.
    """

    layout: str
    bits: int
    group_size: int
    zero_points: bool
    inputs: int
    outputs: int

    @classmethod
    def of(cls, weight: Any) -> "Product | None":
        """Return a weight's [K, N]; None if it is one that tables do not speak of."""
        if weight.layout == "cpu" or getattr(weight, "stored_dtype", "int8") not in INTEGERS:
            return None
        has_zeros = weight.zero_points is not None
        return cls(weight.layout, weight.bits, weight.group_size, has_zeros, *weight.shape)


# Types of a record's fields.
_KINDS: dict[str, tuple[Any, ...]] = {
    **{field.name: (field.type,) for field in dataclasses.fields(Product)},
    "rows": (int,),
    "implementation": (str,),
    "blocks": (dict, type(None)),
    "us": (float, int),
    "float16_us": (float, int),
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """The fastest way that was found to multiply some rows.

    Attributes:
      implementation: a backend's name.
      blocks: fields of its blocks; None if it has none.
      us: microseconds of the product; `float16_us` of XLA's with a float16 weight.
    """

    product: Product
    rows: int
    implementation: str
    blocks: dict[str, int] | None
    us: float
    float16_us: float


@dataclasses.dataclass(frozen=True)
class Table:
    """What was measured on one kind of device.

    Attributes:
      device: JAX's name of the kind.
      entries: by product and rows.
      left_out: candidates that failed, as records; whoever measures does not try them again.
    """

    device: str
    entries: dict[tuple[Product, int], Entry] = dataclasses.field(default_factory=dict)
    left_out: tuple[dict[str, Any], ...] = ()

    def plus(self, failures: Iterable[dict[str, Any]], *entries: Entry) -> "Table":
        """Return the table with more candidates left out, and with more entries."""
        by_key = {(entry.product, entry.rows): entry for entry in entries}
        left_out = (*self.left_out, *failures)
        return dataclasses.replace(self, entries=self.entries | by_key, left_out=left_out)

    def nearest(self, product: Product, rows: int) -> Entry | None:
        """Return the entry of the fewest rows that these fit into; None if nothing is near."""
        rows = min(rows, ROWS[-1])
        measured = sorted(each for other, each in self.entries if other == product)
        fitting = (each for each in measured if rows <= each <= _MAX_PADDING * rows)
        nearest = next(fitting, None)
        return None if nearest is None else self.entries[product, nearest]


def path_in(folder: Path, device_kind: str) -> Path:
    """Return where a folder has the table of a kind of device."""
    return folder / f"{re.sub(r'[^a-z0-9]+', '_', device_kind.lower()).strip('_')}.json"


def read(path: Path) -> Table:
    """Read a table.

    Raises:
      TableError: it is missing or damaged, or of another version.
    """
    record = read_json(path, TableError, f"{path}: there is no such table")
    version = record.get("format") if isinstance(record, dict) else None
    if version != _FORMAT:
        raise TableError(
            f"{path}: expected a table of format {_FORMAT}, got {shown(version)}: make it anew by "
            "glm-jax tune --measure"
        )
    entries = []
    products, left_out = record.get("products"), record.get("left_out", [])
    is_list_of_objects = isinstance(left_out, list) and all(isinstance(x, dict) for x in left_out)
    if not isinstance(products, list) or not is_list_of_objects:
        raise TableError(f"{path}: expected lists `products` and `left_out` of objects")
    for index, each in enumerate(products):
        try:
            entries.append(_entry(each))
        except ValueError as error:
            raise TableError(f"{path}: products[{index}]: {error}") from error
    return Table(str(record.get("device"))).plus(left_out, *entries)


def to_text(table: Table) -> str:
    """Return a table as the text of its file, a line for each product and rows."""
    in_order = sorted(table.entries, key=lambda key: (*dataclasses.astuple(key[0]), key[1]))
    products = [_record(table.entries[key]) for key in in_order]
    lines = lambda records: ",\n".join(f"  {to_json(record)}" for record in records)
    return (
        f'{{"format": {_FORMAT}, "device": {to_json(table.device)},\n'
        f' "products": [\n{lines(products)}\n ],\n'
        f' "left_out": [\n{lines(table.left_out)}\n ]\n}}\n'
    )


def _record(entry: Entry) -> dict[str, Any]:
    record = dataclasses.asdict(entry)
    return record.pop("product") | record


def _entry(record: Any) -> Entry:
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {shown(record)}")
    values: Any = {name: record.get(name) for name in _KINDS}
    for name, value in values.items():
        kinds = _KINDS[name]
        is_number = type(value) in (int, float)
        if type(value) not in kinds or (is_number and not 0 < value < math.inf):
            names = ["null" if kind is type(None) else kind.__name__ for kind in kinds]
            raise ValueError(f"{name}: expected {' or '.join(names)}, got {shown(value)}")
    product = Product(*(values.pop(field.name) for field in dataclasses.fields(Product)))
    values |= {name: float(values[name]) for name in ("us", "float16_us")}
    return Entry(product, **values)


def preferred(
    backends: Sequence[Backend[Arguments]], arguments: Arguments
) -> Sequence[Backend[Arguments]]:
    """Return the backends, before them the one that was fastest where such products were measured.

    Products were measured in float16; so activations in 32 bits are no such products.

    Raises:
      TableError: a table cannot be read, or names a backend that there is not.
    """
    product = Product.of(arguments.weight)
    if product is None or arguments.x.dtype.itemsize != 2:
        return backends
    for path, table in tables(target.device_kind(), os.environ.get(FOLDER)).items():
        entry = table.nearest(product, len(arguments.x))
        fastest = None if entry is None else variant(backends, entry, arguments)
        if fastest is not None:
            return (fastest, *backends)
        names = {backend.name for backend in backends}
        if entry is not None and entry.implementation not in names:
            raise TableError(
                f"{path}: no implementation is called {entry.implementation!r}; expected one of "
                f"{', '.join(sorted(names))}: measure again by glm-jax tune --measure"
            )
    return backends


@functools.cache
def tables(device_kind: str, folder: str | None) -> dict[Path, Table]:
    """Return the tables of a kind of device by their files, those of `folder` first.

    Raises:
      TableError: the folder is missing, or a table cannot be read or is of another device.
    """
    if folder is not None and not Path(folder).is_dir():
        raise TableError(f"{FOLDER}={folder}: there is no such folder")
    folders = [*([] if folder is None else [Path(folder)]), PACKAGED]
    paths = [path_in(each, device_kind) for each in folders]
    found = {path: read(path) for path in paths if path.exists()}
    for path, table in found.items():
        if table.device != device_kind:
            raise TableError(f"{path}: a table of {shown(table.device)}, and this is {device_kind}")
    return found


def variant(
    backends: Iterable[Backend[Arguments]], entry: Entry, arguments: Arguments
) -> Backend[Arguments] | None:
    """Return the backend that an entry names, with its blocks, for the platform compiled for.

    Returns:
      None if no kernel here takes the arguments or the blocks, such as those of an earlier version.
    """
    inputs = arguments.weight.shape[0]
    x = jax.ShapeDtypeStruct((entry.rows, inputs), arguments.x.dtype)
    same_blocks = (
        each
        for each in variants(backends, arguments.replace(x=x))  # type: ignore[attr-defined]
        if each.name == entry.implementation and blocks_of(each) == entry.blocks
    )
    return next(same_blocks, None)


def variants(
    backends: Iterable[Backend[Arguments]], arguments: Arguments
) -> Iterator[Backend[Arguments]]:
    """Yield backends that take the arguments on the platform compiled for, each with all blocks
    that are worth measuring."""
    platform = target.platform()
    for backend in backends:
        if backend.platform not in (platform, None) or backend.supports(arguments) is not None:
            continue
        # A program may be lowered for other platforms too, which nobody measured.
        here: Any = dataclasses.replace(backend, platform=platform)  # type: ignore[type-var]
        if hasattr(backend, "candidates"):
            for blocks in backend.candidates(arguments):
                yield dataclasses.replace(here, blocks=blocks)
        else:
            yield here


def blocks_of(backend: Any) -> dict[str, int] | None:
    """Return the fields of a backend's blocks; None if it has none."""
    blocks = getattr(backend, "blocks", None)
    return None if blocks is None else dataclasses.asdict(blocks)
