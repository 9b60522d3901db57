"""Checks the caches of a directory without a server and without its lock; changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from headstart.caches.cache_file import format
from headstart.caches.cache_file.format import Corrupt
from headstart.caches.entry import Entry
from headstart.caches.scan import OrphanFile, contents
from headstart.config.settings import Settings
from headstart.doctor.offline_model import OfflineModel
from headstart.errors import CacheNotFound, StartupError
from headstart.service.caching.verify import Verdict, VerifyScope, judged, judged_orphan
from headstart.service.models.tuning_store import Tunings


def inspect(settings: Settings, scope: VerifyScope) -> Iterator[Verdict]:
    """The verdicts of a server with these settings, as far as they are known without loading models. Raises
    CacheNotFound if a named cache doesn't exist."""
    found = list(contents(settings.cache_dir))
    inspector = _Inspector(settings, [entry for _, entry in found if isinstance(entry, Entry)])
    n_verdicts = 0
    for path, what in found:
        if scope.covers(what.key):
            n_verdicts += 1
            verdict = judged_orphan(what) if isinstance(what, OrphanFile) else inspector.judge(path, what)
            yield verdict.of(what.namespace)
    if scope.name is not None and not n_verdicts:
        raise CacheNotFound(f"There is no cache {scope.name!r} in {settings.cache_dir}.")


class _Inspector:
    def __init__(self, settings: Settings, entries: list[Entry]) -> None:
        self.settings = settings
        self.entries = entries
        self._models: dict[str, OfflineModel | str] = {}

    def judge(self, path: Path, entry: Entry) -> Verdict:
        try:
            format.verify(path, entry.identity, from_disk=True)
        except (Corrupt, OSError) as error:
            return judged(entry, "corrupt", str(error))
        if entry.model not in self._models:
            self._models[entry.model] = self._model(entry.model)
        model = self._models[entry.model]
        if isinstance(model, str):
            return Verdict(entry.name, entry.model, "ok", detail=model)
        now = model.fingerprint(entry, model.in_force.numerics)
        miss = now.changed_since(entry.fingerprint)
        if miss is None and not entry.forms:
            miss = "evicted" if entry.evicted else "too_short"
        return judged(entry, miss, now.differences(entry.fingerprint))

    def _model(self, model: str) -> OfflineModel | str:
        """The model, or the reason why there is none."""
        path = self.settings.model_paths.get(model)
        if path is None:
            return "the settings have no such model, so it is unknown whether it would hit"
        entries = [entry for entry in self.entries if entry.model == model]
        try:
            return OfflineModel(model, path, self.settings, Tunings(self.settings.cache_dir), entries)
        except StartupError as error:
            return f"it is unknown whether it would hit: {error}"
