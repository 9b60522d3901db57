"""One request in the NPU engine, which serves one at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import monotonic

from headstart.engine.rkllm.run import Run
from headstart.protocol import Source, StateRef, Stats, Submit


@dataclass(eq=False)
class Turn:
    """`generated`: the reported tokens. `loaded`: the state that the runtime has loaded. Times are monotonic
    seconds, 0 until they happen."""

    request: Submit
    arrived: float = field(default_factory=monotonic)
    cancelled: bool = False
    generated: list[int] = field(default_factory=list)
    loaded: StateRef | None = None
    run: Run | None = None
    placed: float = 0.0
    restored: float = 0.0
    first_token: float = 0.0

    @property
    def is_answer(self) -> bool:
        return self.request.save_to is None

    @property
    def cached(self) -> int:
        """The number of prompt tokens that were not evaluated; 0 if the runtime has no counter."""
        if self.run is None or self.run.prefill_tokens is None:
            return 0
        return max(len(self.request.tokens) - max(self.run.prefill_tokens, 0), 0)

    @property
    def source(self) -> Source:
        if not self.cached:
            return "none"
        return "file" if self.loaded else "slot"

    def stats(self, saved_bytes: int = 0, saved_blake3: str = "") -> Stats:
        now = monotonic()
        placed = self.placed or now
        restored = self.restored or placed
        first = self.first_token or now
        n_prompt = len(self.request.tokens)
        return Stats(
            prompt_tokens=n_prompt,
            cached_tokens=self.cached,
            evaluated_tokens=n_prompt - self.cached,
            generated_tokens=len(self.generated),
            source=self.source,
            restored_bytes=self.loaded.nbytes if self.loaded and self.cached else 0,
            saved_bytes=saved_bytes,
            saved_blake3=saved_blake3,
            queue_ms=1000 * (placed - self.arrived),
            restore_ms=1000 * (restored - placed),
            prefill_ms=1000 * (first - restored),
            decode_ms=1000 * (now - first),
            ttft_ms=1000 * (first - self.arrived),
        )
