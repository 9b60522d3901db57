"""The interface of a dialect's writers, which turn an answer's events into the dialect's format."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from typing import Any, Literal, Protocol

from headstart.errors import HeadstartError
from headstart.service.interface.answer import AnswerEvent, Delta, Ended, PromptProgress, Result

Json = dict[str, Any]
Opens = Literal["at_once", "with_answer", "with_progress"]
Events = AsyncGenerator[AnswerEvent, None]


class AnswerWriter(Protocol):
    """Writes the answer to one request, as a whole or as a stream. Each call returns the next events of the
    stream; they are encoded when they are iterated, so do that before the next call, or not at all. `done`:
    the end of a stream. `keep_alive`: sent when an opened stream has been silent for long.

    `opens`: when the opening is sent: "at_once"; "with_answer", together with its first event, or earlier to
    keep a silent stream alive; "with_progress", once the first event was passed, whose figures it has, and
    not before that, however long the stream is silent."""

    done: bytes
    keep_alive: bytes
    opens: Opens

    @property
    def body(self) -> Json:
        """The whole answer; complete after `closing` if it is no stream."""

    def opening(self) -> Iterable[bytes]:
        """Begins a stream; not called for a whole answer."""

    def progress(self, event: PromptProgress) -> Iterable[bytes]:
        """Called before `add`, of a stream only, and only if the request's options ask for progress."""

    def add(self, event: Delta | Ended) -> Iterable[bytes]: ...

    def closing(self, result: Result) -> Iterable[bytes]: ...

    def failed(self, error: HeadstartError) -> Iterable[bytes]:
        """Ends a stream that can't be completed."""
