"""The server's log of its own events."""

from __future__ import annotations

import logging

from headstart.service.interface.observer import (
    Answered,
    Built,
    Evicted,
    Failure,
    Loaded,
    Observer,
    Restored,
)

log = logging.getLogger(__name__)


class LogObserver(Observer):
    """Writes the events to the log."""

    def answered(self, event: Answered) -> None:
        stats = event.result.stats
        log.debug(
            "%s answered: %d prompt tokens, %d of them cached; %d tokens generated",
            event.model,
            stats.prompt_tokens,
            stats.cached_tokens,
            event.result.n_tokens,
        )

    def built(self, event: Built) -> None:
        entry = event.entry
        log.info(
            "built cache %s of %s: %d tokens in %.1f s",
            entry.name,
            entry.namespace,
            entry.n_tokens,
            event.seconds,
        )

    def evicted(self, event: Evicted) -> None:
        entry = event.entry
        # Nobody named a response or an automatic cache, so nobody misses its state by name.
        level = logging.INFO if entry.origin in ("response", "automatic") else logging.WARNING
        log.log(level, "evicted cache %s of %s: freed %d bytes", entry.name, entry.namespace, event.freed)

    def loaded(self, event: Loaded) -> None:
        log.info("model %s was loaded in %.1f s", event.model, event.seconds)

    def restored(self, event: Restored) -> None:
        stats = event.stats
        log.debug(
            "%s restored %d tokens from a file in %.1f ms", event.model, stats.cached_tokens, stats.restore_ms
        )

    def failed(self, event: Failure) -> None:
        match event.work:
            case "build":
                log.warning("building cache %s of %s failed: %s", event.cache, event.model, event.error)
            case "load":
                log.warning("model %s was not loaded: %s", event.model, event.error)
            case "answer":
                log.debug("%s did not answer: %s", event.model, event.error)
