"""The text of a row as its tokens come: what can be given out, and where a stop text ends it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\ufffd"  # what a tokenizer makes of the first bytes of a character


class TextStream:
    """The text of tokens that come one by one, given out in pieces that stay as they are.

    A piece ends before bytes that are no whole character yet and before what may be the beginning of a stop text. The
    pieces together are the text up to the first stop text, without it unless ``include_stop``.

    Args:
        tokenizer: of the model.
        stop: texts that end it.
        include_stop: give out the stop text too.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), include_stop: bool = False) -> None:
        self.tokenizer, self.stop, self.include_stop = tokenizer, [s for s in stop if s], include_stop
        self.text = ""  # of all whole characters
        self.given = 0  # characters of it
        self.found: str | None = None  # the stop text that ended it
        self._tokens: list[int] = []
        # Tokenizers that strip or join need a token before those that are new: text is what the second decoding adds.
        self._before, self._decoded = 0, 0

    def add(self, token: int) -> str:
        """The piece that ``token`` adds, "" for none yet. ``found`` is set where a stop text has come."""
        self._tokens.append(token)
        return self._take(self._decode(self._tokens[self._before :]), last=False)

    def end(self) -> str:
        """The last piece: what was held back."""
        return "" if self.found is not None else self._take(self._decode(self._tokens[self._before :]), last=True)

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _take(self, after: str, last: bool) -> str:
        if last or not after.endswith(_UNFINISHED):
            before = self._decode(self._tokens[self._before : self._decoded])
            new = after[len(before) :]
            self._before, self._decoded = self._decoded, len(self._tokens)
            self.text += new
            places = [(at, s) for s in self.stop if (at := self.text.find(s, self.given)) >= 0]
            if places:
                at, self.found = min(places)
                self.text = self.text[: at + len(self.found) * self.include_stop]
        held = 0 if last or self.found is not None else self._may_begin_a_stop()
        begin, self.given = self.given, max(self.given, len(self.text) - held)
        return self.text[begin : self.given]

    def _may_begin_a_stop(self) -> int:
        """How many characters at the end of the text are the beginning of a stop text."""
        longest = 0
        for stop in self.stop:
            for n in range(min(len(stop) - 1, len(self.text)), longest, -1):
                if self.text.endswith(stop[:n]):
                    longest = n
                    break
        return longest


__all__ = ["TextStream"]
