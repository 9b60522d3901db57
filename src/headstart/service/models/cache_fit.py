"""Reports which caches no longer fit a model's current settings, before any of them is rebuilt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from headstart.caches.entry import Entry, Fingerprint
from headstart.numerics import DEFAULT, Numerics, Tuning


def misfits(entries: Iterable[Entry], fingerprint: Fingerprint) -> dict[str, list[str]]:
    """Names of the caches that can't be used, by the reason in words."""
    found: dict[str, list[str]] = {}
    for entry in entries:
        if reason := fingerprint.differences(entry.fingerprint):
            found.setdefault(reason, []).append(entry.name)
    return found


def warnings(model: str, unfit: Mapping[str, Sequence[str]]) -> list[str]:
    """One warning for each reason, for the user who starts the server."""
    return [
        f"{_caches(len(names))} of {model} no longer fit{'s' if len(names) == 1 else ''}: {reason}. Computed "
        f"again at first use: {in_words(names)}"
        for reason, names in unfit.items()
    ]


def kept_back(model: str, now: Numerics, preferred: Numerics) -> str:
    """Notice that measuring prefers other numerics than those of existing caches."""
    stays, goes = now.shown(), preferred.shown()
    others = [name for name in stays if stays[name] != goes[name]]
    return (
        f"{model} keeps {_values(stays, others)}, as its caches were computed, though measuring prefers "
        f"{_values(goes, others)}. `headstart doctor --measure --yes` changes it."
    )


def doubted(model: str, tuning: Tuning) -> str:
    """Notice that a measurement is unreliable."""
    times = "once" if tuning.tries == 1 else f"{tuning.tries} times"
    return (
        f"{model} was measured {times}, and what was found can't be relied on ({tuning.doubt}). It runs with "
        "safe defaults and is measured again when the server is idle."
    )


def measured_again(model: str, tuning: Tuning, n_caches: int) -> str:
    """Notice that a repeated measurement is used."""
    sure = "what was found is sure" if tuning.is_sure else "the best figures of all tries count, unsure"
    caches = f" {_caches(n_caches)} of it are computed again." if n_caches else ""
    shown = tuning.numerics.shown()
    return f"{model} was measured again, and {sure}: it runs with {_values(shown, list(shown))}.{caches}"


def _values(shown: Mapping[str, str], names: Sequence[str]) -> str:
    return " and ".join(f"{name.replace('_', ' ')} {shown[name]}" for name in names)


def numerics_of(entries: Iterable[Entry], weights: str) -> Numerics:
    """The numerics of most caches of these weights; all unset if there are none."""
    prints = [entry.fingerprint for entry in entries if entry.fingerprint.weights == weights]
    found = Counter(Numerics.of(fingerprint.settings) for fingerprint in prints)
    whole = [numerics for numerics in found if numerics.is_whole]
    return max(whole, key=lambda one: (found[one], one == DEFAULT), default=Numerics())


def in_words(names: Sequence[str], most: int = 5) -> str:
    """A list of names, shortened to `most`."""
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more])


def _caches(n: int) -> str:
    return f"{n} cache{'' if n == 1 else 's'}"
