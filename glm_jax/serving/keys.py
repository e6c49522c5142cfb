"""Keys of those who may ask."""

import hashlib
import hmac
from pathlib import Path

from glm_jax.errors import UserError
from glm_jax.text_files import TextFileError, read_lines


class KeysError(UserError):
    """A file of keys that cannot be used."""


class Keys:
    """Keys of which a request must bring one."""

    def __init__(self, keys: list[str]):
        # Digests are all of one length, so that comparing them tells nothing of a key's. Beyond
        # ASCII, clients write a header in either encoding.
        known = {key.encode() for key in keys}
        known |= {key.encode("latin-1") for key in keys if max(map(ord, key)) < 256}
        self._digests = [hashlib.sha256(key).digest() for key in known]

    @classmethod
    def read(cls, file: str) -> "Keys":
        """Keys of a file, one a line; empty lines and those that begin with # do not count.

        Raises:
          KeysError: the file has none, or cannot be read.
        """
        try:
            lines = [line.strip() for line in read_lines(Path(file))]
        except TextFileError as error:
            raise KeysError(f"--api_keys={error}") from error
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise KeysError(f"--api_keys={file}: no key in it, so that no one could ask")
        return cls(keys)

    def has(self, key: bytes) -> bool:
        """Whether a key, as it is sent, is one of them, in a time that does not depend on
        which."""
        digest = hashlib.sha256(key).digest()
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0
