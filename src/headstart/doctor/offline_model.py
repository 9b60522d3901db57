"""A model as a server would run it, examined without loading its weights."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from msgspec.structs import replace

from headstart.caches.entry import Entry, Fingerprint
from headstart.caches.files import sha256_of
from headstart.config.settings import Settings
from headstart.engine.kinds import engine_kind
from headstart.engine.model import ModelError
from headstart.engine.tuning.resolve import measure_apart, resolved
from headstart.engine.worker_process import worker_environment
from headstart.errors import StartupError
from headstart.numerics import Numerics
from headstart.protocol import EngineSettings
from headstart.service.models.cache_fit import doubted, kept_back, misfits, warnings
from headstart.service.models.model import Notify, facts, model_path
from headstart.service.models.plan import make_plan
from headstart.service.models.tuning_store import Tunings


class OfflineModel:
    """A model with its plan and the caches in the directory. Raises StartupError if it can't be served."""

    def __init__(
        self, name: str, path: str, settings: Settings, tunings: Tunings, entries: Sequence[Entry]
    ) -> None:
        self.name, self.tunings, self.entries = name, tunings, entries
        self.path = model_path(path)
        self.weights = _weights(self.path)
        # On a thread: the caller may already run an event loop.
        with ThreadPoolExecutor(1) as thread:
            model_facts = thread.submit(lambda: asyncio.run(facts(self.path, settings, name))).result()
        self.template = model_facts.template_hash
        self.plan = make_plan(self.path, self.weights, settings, tunings, entries)

    @property
    def in_force(self) -> EngineSettings:
        return resolved(self.plan.settings, self.plan.settings.tuning)

    def misfits(self, numerics: Numerics) -> dict[str, list[str]]:
        """Names of caches that don't fit with it, by reason. It is all of a state's settings that can be
        set."""
        found: dict[str, list[str]] = {}
        for entry in self.entries:
            for reason, names in misfits([entry], self.fingerprint(entry, numerics)).items():
                found.setdefault(reason, []).extend(names)
        return found

    def fingerprint(self, entry: Entry, numerics: Numerics) -> Fingerprint:
        """The fingerprint of states computed with this model; what it can't know is taken from the entry."""
        if not engine_kind(self.path).tunable:
            # Which release computes, and with what context, only its library can say.
            return replace(entry.fingerprint, weights=self.weights, template=self.template)
        others = {k: v for k, v in entry.fingerprint.settings.items() if k not in numerics.shown()}
        return Fingerprint(
            self.weights, self.plan.key.engine, others | numerics.fingerprinted(), self.template
        )

    def measure(self, say: Notify, *, agree: bool) -> None:
        """Measures again; says which caches don't fit what was found, then remembers it. The numerics that
        caches have are kept unless `agree`. Raises StartupError."""
        if not engine_kind(self.path).tunable:
            say(f"{self.name} runs on the NPU: there is nothing to measure.")
            return
        trial_settings = replace(self.plan.settings, tuning=None, tried=self.tunings.doubted(self.plan.key))
        if agree:
            trial_settings = replace(trial_settings, numerics=self.plan.given)
        try:
            tuning = measure_apart(trial_settings, env=worker_environment())
        except ModelError as error:
            raise StartupError(f"Measuring {self.name} failed: {error}") from error
        if not tuning.counts:
            say(doubted(self.name, tuning))
            self.tunings.put(self.plan.key, tuning)
            return
        preferred = self.plan.kept_back(tuning)
        if preferred:
            say(kept_back(self.name, tuning.numerics, preferred))
            for warning in warnings(self.name, self.misfits(preferred)):
                say(f"If it were changed: {warning}")
        for warning in warnings(self.name, self.misfits(tuning.numerics)):
            say(warning)
        self.tunings.put(self.plan.key, tuning, agreed=agree and not self.plan.given.is_whole)


def _weights(path: str) -> str:
    if (substitute := engine_kind(path).weights_id(path)) is not None:
        return substitute
    try:
        return sha256_of(Path(path))
    except OSError as error:
        raise StartupError(f"{path} can't be read: {error.strerror}") from error
