"""The events of a running server. Its log is written from them, and so can be metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from headstart.caches.entry import Entry, Form
from headstart.protocol import Stats
from headstart.service.interface.answer import FinishReason, Result
from headstart.service.interface.options import Options


@dataclass(frozen=True)
class Submitted:
    """The engine gets a request, whose prompt is ready. It is followed by one Answered, InputsEmbedded or
    Failure, unless the server itself fails. `options`: the parameters of one that generates."""

    model: str
    owner: str
    form: Form | Literal["embeddings"]
    options: Options | None = None


@dataclass(frozen=True)
class Answered:
    """A prompt got all its answers, which ended for these `reasons`; a request with several prompts has one
    event for each. One that its client left has a Failure instead, whatever was sent before. Times are
    seconds: `first_token_seconds` and `seconds` from its arrival in the service to its first token and to the
    end, `token_gaps` between the tokens of each answer."""

    model: str
    owner: str
    result: Result
    reasons: Sequence[FinishReason]
    seconds: float
    first_token_seconds: float
    token_gaps: Sequence[float]


@dataclass(frozen=True)
class InputsEmbedded:
    """A request got the embedding of each input; the inputs have `prompt_tokens` tokens together."""

    model: str
    owner: str
    n_inputs: int
    prompt_tokens: int


@dataclass(frozen=True)
class Built:
    """The states of a cache were computed; `stats` are those of each computed form. A form whose state was
    copied from the previous version has none."""

    entry: Entry
    stats: Mapping[Form, Stats]
    seconds: float


@dataclass(frozen=True)
class Evicted:
    """Files of a cache made room: its states alone, or all of it. `freed`: bytes."""

    entry: Entry
    freed: int


@dataclass(frozen=True)
class Loaded:
    """A model is ready to answer."""

    model: str
    seconds: float


@dataclass(frozen=True)
class Restored:
    """The engine restored a state from a file, for a request or a build; `stats` are those of the
    sequence."""

    model: str
    stats: Stats


# The errors of work that nobody waits for any more: its client left, or the server stops.
ABANDONED = (asyncio.CancelledError, GeneratorExit)


@dataclass(frozen=True)
class Failure:
    """Work ended with an error, which may be one of ABANDONED; a build, that of a `cache`."""

    work: Literal["answer", "embed", "build", "load"]
    model: str
    error: BaseException
    cache: str = ""
    owner: str = ""


class Observer:
    """Receives each event once, when it happens, on the event loop. Methods return at once and raise
    nothing; those that a subclass doesn't override ignore their event."""

    def submitted(self, event: Submitted) -> None: ...

    def answered(self, event: Answered) -> None: ...

    def embedded(self, event: InputsEmbedded) -> None: ...

    def built(self, event: Built) -> None: ...

    def evicted(self, event: Evicted) -> None: ...

    def loaded(self, event: Loaded) -> None: ...

    def restored(self, event: Restored) -> None: ...

    def failed(self, event: Failure) -> None: ...


class Observers(Observer):
    """Passes each event to several observers, in order."""

    def __init__(self, observers: Sequence[Observer] = ()) -> None:
        self.observers = observers

    def submitted(self, event: Submitted) -> None:
        for observer in self.observers:
            observer.submitted(event)

    def answered(self, event: Answered) -> None:
        for observer in self.observers:
            observer.answered(event)

    def embedded(self, event: InputsEmbedded) -> None:
        for observer in self.observers:
            observer.embedded(event)

    def built(self, event: Built) -> None:
        for observer in self.observers:
            observer.built(event)

    def evicted(self, event: Evicted) -> None:
        for observer in self.observers:
            observer.evicted(event)

    def loaded(self, event: Loaded) -> None:
        for observer in self.observers:
            observer.loaded(event)

    def restored(self, event: Restored) -> None:
        for observer in self.observers:
            observer.restored(event)

    def failed(self, event: Failure) -> None:
        for observer in self.observers:
            observer.failed(event)
