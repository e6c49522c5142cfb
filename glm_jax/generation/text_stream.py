"""Text of an answer while its tokens come: whole characters, and no further than a stop."""

from collections.abc import Callable, Iterable, Sequence

_INCOMPLETE = "\ufffd"  # what bytes of a character decode to before its last has come
_CONTEXT = 8  # tokens before: enough that a first word keeps its blank


class TextStream:
    """Text that will not change any more.

    The pieces of all tokens join to what they decode to together behind those before.
    """

    def __init__(self, decode: Callable[[Iterable[int]], str], before: Sequence[int] = ()):
        """
        Args:
          decode: a tokenizer's.
          before: tokens that the answer stands behind.
        """
        self._decode = decode
        self._window = list(before[-_CONTEXT:])
        self._known = len(self._window)  # tokens of the window whose text was returned
        self._text = decode(self._window)

    def add(self, token: int) -> str:
        """The text that a token makes certain."""
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith(_INCOMPLETE) or not text.startswith(self._text):
            return ""
        return self._return(text)

    def peek(self, token: int) -> str:
        """The text that a token would add, whole characters or not; nothing changes by it."""
        text = self._decode([*self._window, token])
        return text[len(self._text) :] if text.startswith(self._text) else ""

    def finish(self) -> str:
        """What was still open, whole characters or not."""
        text = self._decode(self._window)
        return self._return(text) if len(self._window) > self._known else ""

    def _return(self, text: str) -> str:
        new = text[len(self._text) :]
        # The next token is decoded behind those of this piece, which keeps the work small;
        # without text of its own a piece would not keep the blank of a word behind it.
        piece = self._window[self._known :]
        alone = self._decode(piece)
        self._window, self._text = (piece, alone) if alone else (self._window, text)
        self._known = len(self._window)
        return new


class Stops:
    """Cuts a text off before the first of some strings."""

    def __init__(self, stops: Sequence[str]):
        self._stops = stops
        self._pending = ""
        self.has_stopped = False

    def add(self, text: str) -> str:
        """As much of the text so far, and not returned yet, as no stop can begin in."""
        self._pending += text
        starts = [at for stop in self._stops if (at := self._pending.find(stop)) >= 0]
        if starts:
            self.has_stopped = True
            return self._take(min(starts))
        return self._take(len(self._pending) - self._possible())

    def finish(self) -> str:
        """What was held back, where no stop came of it."""
        return "" if self.has_stopped else self._take(len(self._pending))

    def _take(self, count: int) -> str:
        text, self._pending = self._pending[:count], self._pending[count:]
        return text

    def _possible(self) -> int:
        """Characters at the end that a stop may begin with."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for count in range(min(longest, len(self._pending)), 0, -1):
            if any(stop.startswith(self._pending[-count:]) for stop in self._stops):
                return count
        return 0
