"""Text of an answer while its tokens arrive: whole characters, cut off at a stop text."""

from collections.abc import Callable, Iterable, Sequence

_INCOMPLETE = "\ufffd"  # what the first bytes of a character decode to
_CONTEXT = 8  # tokens before the answer: enough that its first word keeps its space


class TextStream:
    """Decodes tokens one by one into text that later tokens do not change.

    The pieces of all tokens join to what the tokens decode to together, after those before them.
    """

    def __init__(self, decode: Callable[[Iterable[int]], str], before: Sequence[int] = ()):
        """
        Args:
          decode: a tokenizer's.
          before: tokens that the answer follows.
        """
        self._decode = decode
        self._window = list(before[-_CONTEXT:])
        self._known = len(self._window)  # tokens of the window whose text was returned
        self._text = decode(self._window)

    def add(self, token: int) -> str:
        """Add a token, and return the text that is certain with it."""
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith(_INCOMPLETE) or not text.startswith(self._text):
            return ""
        return self._return(text)

    def peek(self, token: int) -> str:
        """Return the text that a token would add, whole characters or not; changes nothing."""
        text = self._decode([*self._window, token])
        return text[len(self._text) :] if text.startswith(self._text) else ""

    def finish(self) -> str:
        """Return the remaining text, whole characters or not."""
        text = self._decode(self._window)
        return self._return(text) if len(self._window) > self._known else ""

    def _return(self, text: str) -> str:
        new = text[len(self._text) :]
        # The next token is decoded after those of this piece only, which keeps the work small;
        # a piece without text of its own would not keep the space of a word after it.
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
        """Add text, and return what is not returned yet, up to where a stop text may begin."""
        self._pending += text
        starts = [at for stop in self._stops if (at := self._pending.find(stop)) >= 0]
        if starts:
            self.has_stopped = True
            return self._take(min(starts))
        return self._take(len(self._pending) - self._possible())

    def finish(self) -> str:
        """Return the remaining text, if no stop text has come."""
        return "" if self.has_stopped else self._take(len(self._pending))

    def _take(self, count: int) -> str:
        text, self._pending = self._pending[:count], self._pending[count:]
        return text

    def _possible(self) -> int:
        """Return the number of characters at the end that a stop text may begin with."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for count in range(min(longest, len(self._pending)), 0, -1):
            if any(stop.startswith(self._pending[-count:]) for stop in self._stops):
                return count
        return 0
