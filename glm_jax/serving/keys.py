"""API keys."""

import hashlib
import hmac
from pathlib import Path

from glm_jax.errors import UserError
from glm_jax.text_files import TextFileError, read_lines


class KeysError(UserError):
    """A file of keys that cannot be used."""


class Keys:
    """API keys, one of which each request must have."""

    def __init__(self, keys: list[str]):
        # Digests have one length, so that comparing them reveals nothing of a key's. Beyond
        # ASCII, clients encode a header in UTF-8 or in Latin-1.
        encoded = {key.encode() for key in keys}
        encoded |= {key.encode("latin-1") for key in keys if max(map(ord, key)) < 256}
        self._digests = [hashlib.sha256(key).digest() for key in encoded]

    @classmethod
    def read(cls, file: str) -> "Keys":
        """Read a file of one key a line; empty lines and those that begin with # are skipped.

        Raises:
          KeysError: the file has no key, or cannot be read.
        """
        try:
            lines = [line.strip() for line in read_lines(Path(file))]
        except TextFileError as error:
            raise KeysError(f"--api_keys={error}") from error
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise KeysError(f"--api_keys={file}: no key in it: add one, or leave out the flag")
        return cls(keys)

    def has(self, key: bytes) -> bool:
        """Whether a key, as sent, is one of these; the time does not depend on which."""
        digest = hashlib.sha256(key).digest()
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0
