"""The NPU's engine on the stand-in runtime, stepped by tests."""

from __future__ import annotations

from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from blake3 import blake3

from driver import GREEDY
from headstart.caches.cache_file.format import identity_of
from headstart.engine.rkllm.build import build_engine
from headstart.engine.rkllm.engine import RkllmEngine
from headstart.prompt.hf_tokenizer import HfTokenizer
from headstart.protocol import (
    EngineSettings,
    Failed,
    Finished,
    RequestEvent,
    RkllmSettings,
    SaveTo,
    StateRef,
    Submit,
    Token,
)
from rkllm_models import tokenizer_files
from rkllm_standin import standin, standin_model

SECONDS = 20.0


class NpuDriver:
    """Collects the events of each request; prompts are texts."""

    def __init__(
        self, release: str, folder: Path, *, ctx: int = 512, weights: str = "a", **more: Any
    ) -> None:
        self.folder = folder
        self.path = standin_model(folder / "model.rkllm", weights=weights)
        tokenizer_files(folder)
        self.tokenizer = HfTokenizer(self.path)
        self.woken: SimpleQueue[None] = SimpleQueue()
        settings = EngineSettings(self.path, 0, ctx, rkllm=RkllmSettings(library=standin(release), **more))
        self.engine: RkllmEngine = build_engine(settings, lambda: self.woken.put(None))
        self.events: dict[int, list[RequestEvent]] = {}
        self.last_id = 0

    def submit(self, text: str, max_tokens: int = 8, **more: Any) -> int:
        self.last_id += 1
        tokens = self.tokenizer.encode(text)
        request = Submit(
            self.last_id, tokens, max_tokens=max_tokens, text=text, **{"sampling": GREEDY, **more}
        )
        self.events[request.id] = []
        self.engine.handle(request)
        return request.id

    def step(self) -> None:
        for event in self.engine.step():
            self.events[event.id].append(event)

    def step_until_woken(self) -> None:
        """One wake-up's worth; fails where none comes."""
        if not self.engine.busy:
            try:
                self.woken.get(timeout=SECONDS)
            except Empty:
                raise AssertionError("the engine does not go on") from None
        self.step()

    def finish(self) -> None:
        while not self.engine.idle:
            self.step_until_woken()

    def wait_for_token(self, request: int, n: int = 1) -> None:
        while len(self.tokens(request)) < n:
            self.step_until_woken()

    def tokens(self, request: int) -> list[int]:
        return [event.token for event in self.events[request] if isinstance(event, Token)]

    def last(self, request: int) -> RequestEvent:
        """The one terminal event."""
        assert sum(isinstance(event, Finished | Failed) for event in self.events[request]) == 1
        return self.events[request][-1]

    def end(self, request: int) -> Finished:
        end = self.last(request)
        assert isinstance(end, Finished), end
        return end

    def failed(self, request: int) -> Failed:
        end = self.last(request)
        assert isinstance(end, Failed), end
        return end

    def run(self, text: str, max_tokens: int = 8, **more: Any) -> tuple[list[int], Finished]:
        request = self.submit(text, max_tokens, **more)
        self.finish()
        return self.tokens(request), self.end(request)

    def submit_save(self, text: str, name: str = "state", **more: Any) -> int:
        place = SaveTo(str(self.folder / name))
        return self.submit(text, 0, boundary=len(self.tokenizer.encode(text)), save_to=place, **more)

    def save(self, text: str, name: str = "state", **more: Any) -> StateRef:
        request = self.submit_save(text, name, **more)
        self.finish()
        end = self.end(request)
        path = self.folder / name
        stat = path.stat()
        assert (end.reason, end.stats.saved_bytes) == ("saved", stat.st_size)
        assert end.stats.saved_blake3 == blake3(path.read_bytes()).hexdigest()
        n_tokens = len(self.tokenizer.encode(text))
        return StateRef(str(path), 0, stat.st_size, n_tokens, identity_of(stat))

    def n_tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(text))
