"""The values of an OCDBT store, read from its files in pieces that are checked as they arrive."""

import contextlib
import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from glm_jax.checkpoints.checksums import damaged, piece_checksum, pieces, unreadable
from glm_jax.checkpoints.summed_read import block_sums, read_summed

# "value:FOLDER/:FILE:OFFSET:BYTES"
_LOCATION = re.compile(r"value:((?:[\w.]+/)?):(d/\w+):(\d+):(\d+)")


@dataclasses.dataclass(frozen=True)
class StoredValue:
    """The bytes of an array, contiguous in C order.

    Attributes:
      folder: of the store.
      file: that has them, open.
      offset: in bytes, where they begin in the file.
      content: of values that the store's index holds itself; the others have `file`.
    """

    folder: Path
    file: Any = None
    offset: int = 0
    content: bytes | None = None

    def read_into(self, target: np.ndarray) -> int:
        """Read it into an array, which need not be contiguous; return its `chunk_checksum`.

        Raises:
          DamageError: the file ends before it.
        """
        offset, checksum = self.offset, 0
        spare = np.empty(0, np.uint8)
        for index in pieces(target.shape, target.itemsize):
            piece = target[(*index, ...)]
            is_direct = piece.flags.c_contiguous
            if not is_direct and len(spare) < piece.nbytes:
                spare = np.empty(piece.nbytes, np.uint8)
            content = piece.reshape(-1).view(np.uint8) if is_direct else spare[: piece.nbytes]
            checksum = piece_checksum(content, checksum, self._fill(content, offset))
            if not is_direct:
                piece[...] = content.view(target.dtype).reshape(piece.shape)
            offset += len(content)
        return checksum

    def _fill(self, target: np.ndarray, offset: int) -> np.ndarray:
        """Return the `block_sums` of what it read."""
        if self.content is not None:
            target[:] = np.frombuffer(self.content, np.uint8, len(target), offset)
            return block_sums(target)
        try:
            return read_summed(self.file.fileno(), offset, target)
        except EOFError:
            raise damaged(self.file.name, "it is cut") from None


class StoredValues:
    """Where the values of an OCDBT store are; its files stay open until `close`."""

    def __init__(self, folder: Path):
        """Open a store.

        Raises:
          DamageError: the store has no index, or one that is damaged.
        """
        self.folder = folder
        self._found = _locations(folder)
        self._files = contextlib.ExitStack()
        self._by_path: dict[Path, Any] = {}

    def close(self) -> None:
        self._files.close()

    def find(self, key: str, described: Any) -> StoredValue:
        """Return the value with a key, which has as many bytes as a described array.

        Raises:
          DamageError: there is none, or it has another size.
        """
        size = math.prod(described.shape) * described.dtype.itemsize
        found = self._found.get(key)
        if isinstance(found, bytes) and len(found) == size:
            return StoredValue(self.folder, content=found)
        match = _LOCATION.fullmatch(found) if isinstance(found, str) else None
        if match is None or int(match[4]) != size:
            raise damaged(f"{self.folder}: {key}", "it is missing, or has another size")
        path = self.folder / match[1] / match[2]
        if path not in self._by_path:
            self._by_path[path] = self._files.enter_context(path.open("rb", buffering=0))
        return StoredValue(self.folder, self._by_path[path], int(match[3]))


def _locations(folder: Path) -> dict[str, bytes | str]:
    """By key, a value that is in the index itself, or where it is."""
    found: dict[str, bytes | str] = {}
    try:
        base = ts.KvStore.open({"driver": "file", "path": f"{folder.absolute()}/"}).result()
        version = ts.ocdbt.dump(base).result()["versions"][-1]
        nodes = [("", version["root"]["location"])]
        seen = {nodes[0][1]}
        while nodes:
            prefix, location = nodes.pop()
            for entry in ts.ocdbt.dump(base, location).result()["entries"]:
                if "location" not in entry:
                    key = prefix + entry["key"].decode()
                    found[key] = entry.get("inline_value", entry.get("indirect_value"))
                    continue
                if entry["location"] in seen:  # work that would double with each level
                    raise ValueError(f"{entry['location']} is twice in its index")
                seen.add(entry["location"])
                nodes.append((prefix + entry["subtree_common_prefix"].decode(), entry["location"]))
    except (ValueError, OSError, KeyError, IndexError, TypeError) as error:
        raise unreadable(folder, error) from error
    return found
