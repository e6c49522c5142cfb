"""The tokenizer of the oracle's data."""

import re
from typing import ClassVar


class WordTokenizer:
    """The oracle's stub: token 17 is the word t17."""

    _names: ClassVar = {
        500: "[[MASK]]",
        501: "[[gMASK]]",
        502: "[[sMASK]]",
        504: "[sop]",
        505: "[eop]",
    }
    _masks: ClassVar = {"[MASK]": 500, "[gMASK]": 501, "[sMASK]": 502}

    def __init__(self, special_tokens):
        self.special_tokens = special_tokens

    def encode(self, text, control_words=()):
        words = re.sub(r"(\[[sg]?MASK\])", r" \1 ", text).split()
        return [self._masks[w] if w in self._masks else int(w[1:]) for w in words]

    def decode(self, ids):
        return " ".join(self._names.get(i, f"t{i}") for i in ids)
