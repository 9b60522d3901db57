"""An engine that tests step by hand."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from headstart.caches.cache_file.format import identity_of
from headstart.engine.core.chunking import Chunking
from headstart.engine.core.engine import CoreEngine
from headstart.engine.kinds import engine_kind
from headstart.engine.model import Model
from headstart.engine.states.store import StateStore
from headstart.numerics import DEFAULT
from headstart.protocol import (
    EngineSettings,
    Failed,
    Finished,
    RequestEvent,
    Sampling,
    SaveTo,
    StateRef,
    Submit,
    Token,
)

CHUNK = 16
GREEDY = Sampling(temperature=0)
PROMPT = [5 + i * i % 190 for i in range(100)]
OTHER = [7 + i * 3 % 190 for i in range(90)]


class Driver:
    """An engine stepped by hand; collects the events of each request."""

    def __init__(self, model: Model, share_from: int = 32, store: StateStore | None = None) -> None:
        for seq in range(2 * model.info.slots + 1 if model.info.pool_tokens else model.info.slots):
            model.clear(seq)
        self.model = model
        self.woken: SimpleQueue[None] = SimpleQueue()
        wake = partial(self.woken.put, None)
        self.engine = CoreEngine(model, Chunking(CHUNK), wake, share_from=share_from, store=store)
        self.events: dict[int, list[RequestEvent]] = {}
        self.last_id = 0

    def submit(self, tokens: list[int], max_tokens: int = 8, **more: Any) -> int:
        request = Submit(self.last_id + 1, tokens, max_tokens=max_tokens, **{"sampling": GREEDY, **more})
        self.last_id += request.n
        self.events |= {answer: [] for answer in range(request.id, request.id + request.n)}
        self.engine.handle(request)
        return request.id

    def step(self) -> None:
        for event in self.engine.step():
            self.events[event.id].append(event)
        self.engine.scheduler.check_integrity()

    def finish(self) -> None:
        while self.engine.busy:
            self.step()

    def tokens(self, request: int) -> list[int]:
        return [event.token for event in self.events[request] if isinstance(event, Token)]

    def end(self, request: int) -> Finished:
        end = self.events[request][-1]
        assert isinstance(end, Finished), end
        assert sum(isinstance(event, Finished | Failed) for event in self.events[request]) == 1
        return end

    def run(self, tokens: list[int], max_tokens: int = 8, **more: Any) -> tuple[list[int], Finished]:
        request = self.submit(tokens, max_tokens, **more)
        self.finish()
        return self.tokens(request), self.end(request)

    def run_waiting(self, tokens: list[int], max_tokens: int = 8, **more: Any) -> tuple[list[int], Finished]:
        """As `run`, also where the engine waits for the disk."""
        request = self.submit(tokens, max_tokens, **more)
        self.finish()
        while not self.events[request]:
            self.woken.get(timeout=10)
            self.step()
            self.finish()
        return self.tokens(request), self.end(request)

    def save(self, tokens: list[int], path: Path, **more: Any) -> StateRef:
        path.touch()
        request = self.submit(tokens, 0, boundary=len(tokens), save_to=SaveTo(str(path)), **more)
        self.finish()
        self.woken.get(timeout=10)
        self.step()
        end = self.end(request)
        assert end.reason == "saved"
        stat = path.stat()
        assert end.stats.saved_bytes == stat.st_size
        return StateRef(str(path), 0, stat.st_size, len(tokens), identity_of(stat))

    def evict(self) -> None:
        """Fills every slot with something else."""
        for i in range(self.model.info.slots):
            self.submit([20 + i, *OTHER], 1, reuse=False)
        self.finish()


def small_model(path: str, slots: int = 3, share_from: int = 32) -> Model:
    settings = EngineSettings(path, slots, 256, 1, CHUNK, numerics=DEFAULT, share_from=share_from)
    return engine_kind(path).load(settings)
