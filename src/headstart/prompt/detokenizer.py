"""Generated tokens to text: complete characters only, ended by stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence

from headstart.tokens import overlap


class AnswerDetokenizer:
    """Turns tokens into text that may be sent. Text that could become a stop string, and an incomplete
    character, are held back until they are decided. Stop strings are never part of the text. `found`: the
    stop string that ended it. `n_characters`: complete characters so far, including those held back."""

    def __init__(self, piece: Callable[[int], bytes], stop: Sequence[str] = ()) -> None:
        self.piece = piece
        self.stop = [text for text in stop if text]
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.buffer = ""
        self.found: str | None = None
        self.n_characters = 0

    @property
    def stopped(self) -> bool:
        return self.found is not None

    def add(self, token: int) -> str:
        """The text that this token releases, possibly none; none once `stopped` is true."""
        return self._release(self.decoder.decode(self.piece(token)))

    def end(self) -> str:
        """The text held back, when no token follows; an incomplete character becomes U+FFFD."""
        text = self._release(self.decoder.decode(b"", final=True)) + self.buffer
        self.buffer = ""
        return text

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        self.n_characters += len(text)
        text = self.buffer + text
        places = [(at, stop) for stop in self.stop if (at := text.find(stop)) >= 0]
        if places:
            at, self.found = min(places)
            self.buffer = ""
            return text[:at]
        keep = max((overlap(text, stop) for stop in self.stop), default=0)
        self.buffer = text[len(text) - keep :]
        return text[: len(text) - keep]
