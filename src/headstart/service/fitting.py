"""Which caches fit what a model is run with now, told before any is computed again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from headstart.caches.entry import Entry, Fingerprint
from headstart.messages import Tuning


def misfits(entries: Iterable[Entry], fingerprint: Fingerprint) -> dict[str, list[str]]:
    """Names of the caches that can't be used, by the reason in words."""
    found: dict[str, list[str]] = {}
    for entry in entries:
        if reason := fingerprint.differences(entry.fingerprint):
            found.setdefault(reason, []).append(entry.name)
    return found


def warnings(model: str, unfit: Mapping[str, Sequence[str]]) -> list[str]:
    """Sentences for whoever starts the server, one for each reason."""
    return [
        f"{_caches(len(names))} of {model} no longer fit{'s' if len(names) == 1 else ''}: {reason}. Computed "
        f"again at first use: {in_words(names)}"
        for reason, names in unfit.items()
    ]


def kept_back(model: str, tuning: Tuning) -> str:
    """Said where measuring prefers the flash attention that existing caches don't have."""
    return (
        f"Flash attention of {model} stays {on_off(tuning.flash_attention)}, as its caches were computed, "
        f"though measuring prefers it {on_off(tuning.prefers_flash_attention)}. "
        "`headstart doctor --measure --yes` changes it."
    )


def on_off(flag: bool) -> str:
    return "on" if flag else "off"


def flash_attention_of(entries: Iterable[Entry], weights: str) -> bool | None:
    """What most caches of these weights were computed with; None where there are none."""
    prints = [entry.fingerprint for entry in entries if entry.fingerprint.weights == weights]
    found = [fingerprint.settings.get("flash_attention") for fingerprint in prints]
    on, off = found.count("on"), found.count("off")
    return None if on == off == 0 else on > off


def in_words(names: Sequence[str], most: int = 5) -> str:
    """A list of names that doesn't become too long."""
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more])


def _caches(n: int) -> str:
    return f"{n} cache{'' if n == 1 else 's'}"
