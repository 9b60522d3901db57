"""Embeddings, computed in bounded parts between the steps of generation."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from headstart.engine.core.chunking import Chunking
from headstart.engine.model import Embedder, Model, ModelError, TooLarge
from headstart.protocol import Embed, Embedded, Failed, FailureKind, RequestEvent, Vector

# The most inputs per step: each costs a pass over the weights, however short it is.
INPUTS_A_STEP = 4


@dataclass(eq=False, slots=True)
class Job:
    """A request: `done` inputs have their vectors, and `computed` tokens of the next one are evaluated."""

    request: Embed
    done: int = 0
    computed: int = 0

    @property
    def is_done(self) -> bool:
        return self.done == len(self.request.inputs)

    @property
    def tokens(self) -> list[int]:
        """The tokens of the current input."""
        return self.request.inputs[self.done]


class Embeddings:
    """Embedding requests; each ends in exactly one Embedded or Failed event. Requests take turns after each
    input. Inputs are evaluated alone and cut by their own length, so that an embedding is the same to the
    bit, whatever else is requested.

    The embedder is created, and takes memory, at the first request."""

    def __init__(self, model: Model, chunking: Chunking) -> None:
        self.model = model
        self.chunking = chunking
        self.jobs: deque[Job] = deque()
        self.embedder: Embedder | None = None

    @property
    def busy(self) -> bool:
        return bool(self.jobs)

    def add(self, request: Embed) -> None:
        self.jobs.append(Job(request))

    def cancel(self, request_id: int) -> Iterator[RequestEvent]:
        for job in [job for job in self.jobs if job.request.id == request_id]:
            self.jobs.remove(job)
            yield Embedded(request_id)

    def step(self) -> list[RequestEvent]:
        """Evaluates about one chunk's worth of tokens, and returns the resulting events."""
        events: list[RequestEvent] = []
        n_left, ms_left = self.chunking.size(0), self.chunking.longest_ms
        for _ in range(INPUTS_A_STEP):
            if not self.jobs or n_left <= 0 or ms_left <= 0:
                break
            job = self.jobs[0]
            start = job.computed
            try:
                n_tokens = self._advance(job)
                if job.computed == len(job.tokens):
                    events += self._ended(job)
            except ModelError as error:
                events.append(self._failed(job, error))
                break
            n_left -= n_tokens
            ms_left -= self.chunking.cost(start, n_tokens)
        return events

    def _advance(self, job: Job) -> int:
        """Evaluates the next piece of the input and returns its number of tokens. Raises ModelError."""
        self.embedder = embedder = self.embedder or self.model.embedder()
        tokens, start = job.tokens, job.computed
        if start == 0:
            embedder.clear()
        job.computed = len(tokens) if embedder.whole else self.chunking.end(start, 0, len(tokens))
        embedder.evaluate(start, tokens[start : job.computed])
        return job.computed - start

    def _ended(self, job: Job) -> list[RequestEvent]:
        """Takes the vector of an evaluated input. Raises ModelError if there is none."""
        assert self.embedder
        vector = Vector(job.request.id, self.embedder.vector())
        self.jobs.popleft()
        job.done, job.computed = job.done + 1, 0
        if job.is_done:
            return [vector, Embedded(job.request.id)]
        self.jobs.append(job)
        return [vector]

    def _failed(self, job: Job, error: ModelError) -> Failed:
        self.jobs.remove(job)
        kind: FailureKind = "memory" if isinstance(error, TooLarge) else "engine"
        return Failed(job.request.id, kind, f"No embeddings can be made: {error}.")
