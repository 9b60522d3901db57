"""Counts the requests that started from a state, by where it lay."""

from __future__ import annotations

from collections import Counter, defaultdict

from headstart.protocol import Source
from headstart.service.interface.observer import Answered, Observer


class ReuseCounter(Observer):
    """`hits`: requests by model and source, since the start."""

    def __init__(self) -> None:
        self.hits: defaultdict[str, Counter[Source]] = defaultdict(Counter)

    def answered(self, event: Answered) -> None:
        source = event.result.stats.source
        if source != "none":
            self.hits[event.model][source] += 1

    def of(self, model: str | None) -> Counter[Source]:
        """The hits of one model, or of all."""
        if model is not None:
            return self.hits[model]
        return sum(self.hits.values(), Counter())
