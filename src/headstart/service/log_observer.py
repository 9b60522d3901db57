"""The server's log of its own events."""

from __future__ import annotations

import logging

from headstart.errors import HeadstartError
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
        if not log.isEnabledFor(logging.INFO):
            return
        stats = event.result.stats
        log.info(
            "answered",
            extra={
                **_who(event.model, event.owner),
                "prompt_tokens": stats.prompt_tokens,
                "cached_tokens": stats.cached_tokens,
                "generated_tokens": event.result.n_tokens,
                "source": stats.source,
                "miss_reason": event.result.miss,
                "queue_ms": round(stats.queue_ms, 1),
                "first_token_ms": round(1000 * event.first_token_seconds, 1),
                "total_ms": round(1000 * event.seconds, 1),
            },
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
            case "answer" | "embed":
                code = "client_left"
                if isinstance(event.error, HeadstartError):
                    code = event.error.log_code
                    event.error.is_logged = True
                log.info("not answered", extra={**_who(event.model, event.owner), "error": code})


def _who(model: str, owner: str) -> dict[str, str | None]:
    """The model, and the name of the request's API key."""
    return {"model": model, "key": owner or None}
