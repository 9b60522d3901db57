"""Generated tokens to text: whole characters only, ended by stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence


class AnswerText:
    """Turns tokens into text that may be sent. What could still become a stop string, or is an unfinished
    character, is held back until it is decided. Stop strings themselves are never part of the text.
    `found`: the one that ended it. `n_characters`: of all whole characters so far, held back or not."""

    def __init__(self, piece: Callable[[int], bytes], stop: Sequence[str] = ()) -> None:
        self.piece = piece
        self.stop = [text for text in stop if text]
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.held = ""
        self.found: str | None = None
        self.n_characters = 0

    @property
    def stopped(self) -> bool:
        return self.found is not None

    def add(self, token: int) -> str:
        """The text that this token releases, possibly none; once `stopped` is true there is no more."""
        return self._release(self.decoder.decode(self.piece(token)))

    def end(self) -> str:
        """What is left when no token follows; an unfinished character becomes U+FFFD."""
        text = self._release(self.decoder.decode(b"", final=True)) + self.held
        self.held = ""
        return text

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        self.n_characters += len(text)
        text = self.held + text
        places = [(at, stop) for stop in self.stop if (at := text.find(stop)) >= 0]
        if places:
            at, self.found = min(places)
            self.held = ""
            return text[:at]
        keep = max((_overlap(text, stop) for stop in self.stop), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
