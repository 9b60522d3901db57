"""Measures the fastest settings on this machine: `python -m headstart.engine.tuning.measure SETTINGS` writes
a Tuning as JSON.

Alternatives are timed in turn, so that a noisy moment hurts all of them, and compared by their shortest
times: other work on the machine only ever adds to one. Each is timed in two groups, apart in time; a figure
is doubtful if these disagree, or if there was other load on the machine. A slow model is measured over fewer
tokens, not for longer.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from math import ceil
from typing import Any, TypeVar

import msgspec

from headstart.engine.converted_weights import discard
from headstart.engine.model import ModelError
from headstart.engine.trials import Trials, TrialShape
from headstart.engine.tuning.bench import Bench, disagreement, in_groups
from headstart.engine.tuning.costs import Sample, fit
from headstart.machine import available_cpus, physical_cores
from headstart.numerics import DEFAULT, Numerics, Tuning, preferred
from headstart.protocol import EngineSettings

# A hit: new tokens after the prefix, and tokens of the answer. Only its first words count, since people wait
# for them; the others always come faster than they are read.
SUFFIX, ANSWER = 20, 8
# An alternative must take at most this share of the default's time.
MARGIN = 0.97
UBATCHES = (16, 32, 64, 128, 256)
NEAR_BEST = 0.95
# The depth of measurements: the tokens prefilled in FILL_MS, within these bounds.
LEAST_DEPTH, MOST_DEPTH, FILL = 64, 1024, 64
FILL_MS = 5000
# The longest single call, and the time limit of each comparison, unless one round of it takes longer.
CALL_MS = 1200
THREADS_MS, HITS_MS, UBATCH_MS, LAYOUT_MS = 1000, 2400, 3000, 600
LAYOUT_SEQUENCES, LAYOUT_ROOM = 4, 64
# The comparison of layouts is extrapolated to at most this multiple of its depth.
EXTRAPOLATION = 8
Key = TypeVar("Key")


def measure(
    settings: EngineSettings, open_trials: Callable[[EngineSettings], Trials] | None = None
) -> Tuning:
    """Measures a model, in about 15 seconds for a small one. `threads` (unless 0) and the choices in
    `numerics` that are not open are fixed; other numerics are measured all the same. Raises ModelError."""
    trials = (open_trials or _llama_trials)(settings)
    try:
        with ExitStack() as stack:
            return Measurement(trials, stack, settings).run()
    finally:
        trials.close()


def _llama_trials(settings: EngineSettings) -> Trials:
    from headstart.engine.llama.trial import LlamaTrials

    return LlamaTrials(settings)


class Measurement:
    """One measurement. `stack` closes trials that are still open at its end."""

    def __init__(self, trials: Trials, stack: ExitStack, settings: EngineSettings) -> None:
        self.trials, self.stack = trials, stack
        self.threads, self.allowed, self.existing = settings.threads, settings.numerics, settings.existing
        tried = settings.tried
        self.tries, self.tried = (tried.tries, tried.measured) if tried else (0, {})
        # The results of earlier tries are comparable at the same depth only.
        self.least_depth = max(LEAST_DEPTH, min(tried.depth if tried else 0, MOST_DEPTH))
        self.figures: dict[str, float] = {}
        self.doubts: dict[str, str] = {}
        # The chosen number of threads, for the names of figures.
        self.suffix = ""

    def run(self) -> Tuning:
        benches = self._benches()
        threads = self._choose_threads(list(benches.values()))
        depth = self._fill(benches)
        hits = self._time_hits(benches, depth)
        ranking = sorted(hits, key=lambda tried: _hit_ms(hits[tried]) * (MARGIN if tried == DEFAULT else 1))
        costs = {tried: _hit_ms(hits[tried]) for tried in ranking}
        chosen = preferred(costs, self.allowed, self.existing)
        for tried, bench in benches.items():
            if tried != chosen:
                bench.trial.close()
        bench = benches[chosen]
        ubatch, samples = self._time_prefill(bench, depth)
        samples += [Sample(n, depth + n, ms) for n, ms in hits[chosen].items()]
        return Tuning(
            numerics=chosen,
            threads=threads,
            ubatch=ubatch,
            **fit(samples)._asdict(),
            share_from=self._choose_layout(bench, depth, threads),
            ranking=ranking,
            measured={name: round(ms, 2) for name, ms in self.figures.items()},
            hits=list(costs.values()),
            tries=self.tries + 1,
            doubts=self.doubts,
            depth=depth,
        )

    def _times(
        self, actions: Mapping[Key, Callable[[], float]], names: Mapping[Key, str], budget_ms: float
    ) -> dict[Key, float]:
        """The shortest time of each action. If any is doubtful, earlier tries count for all of them, so that
        all are compared on equal terms."""
        self.trials.watch.begin()
        groups = in_groups(actions, budget_ms, self.trials.watch.pause)
        busy = self.trials.watch.doubt()
        times = {key: min(found) for key, found in groups.items()}
        doubts = {key: doubt for key, found in groups.items() if (doubt := busy or disagreement(found))}
        if doubts:
            times = {key: min(ms, self.tried.get(names[key], ms)) for key, ms in times.items()}
        self.figures |= {names[key]: ms for key, ms in times.items()}
        self.doubts |= {names[key]: doubt for key, doubt in doubts.items()}
        return times

    def _bench(self, shape: TrialShape) -> Bench:
        return Bench(self.trials.trial(shape), shape)

    def _benches(self) -> dict[Numerics, Bench]:
        """One bench for each possible numerics. Sequence 0 will be filled, sequence 1 stays empty."""
        benches: dict[Numerics, Bench] = {}
        refused = ModelError("there is nothing to be measured")
        for tried in [Numerics(on, weights) for weights in self.trials.weights for on in (False, True)]:
            room = MOST_DEPTH + UBATCHES[-1]
            shape = TrialShape(2, room, True, UBATCHES[-1], self.threads or available_cpus(), tried)
            try:
                benches[tried] = self._bench(shape)
            except ModelError as error:
                # Some models work only with flash attention, others only without.
                refused = error
                continue
            self.stack.callback(benches[tried].trial.close)
            # llama.cpp also reserves its memory in the first call.
            benches[tried].time(UBATCHES[0], [1])
        if not any(map(self.allowed.allows, benches)):
            raise refused
        return benches

    def _choose_threads(self, benches: Sequence[Bench]) -> int:
        if self.threads:
            return self.threads
        everyone = available_cpus()
        candidates = thread_counts(everyone, physical_cores())
        best = everyone
        if len(candidates) > 1:
            hits = self._time_threads(benches[0], candidates)
            best = min(candidates, key=lambda n: _hit_ms(hits[n]) * (MARGIN if n == everyone else 1))
            self.suffix = f", {_threads(best)}"
        for bench in benches:
            bench.trial.set_threads(best)
        return best

    def _time_threads(self, bench: Bench, candidates: Sequence[int]) -> dict[int, dict[int, float]]:
        def timing(threads: int, n: int) -> Callable[[], float]:
            def timed() -> float:
                bench.trial.set_threads(threads)
                return bench.time(n, [1])

            return timed

        actions = {(threads, n): timing(threads, n) for threads in candidates for n in (1, SUFFIX)}
        names = {(threads, n): f"{_tokens(n)}, {_threads(threads)}" for threads, n in actions}
        times = self._times(actions, names, THREADS_MS)
        return {threads: {n: times[threads, n] for n in (1, SUFFIX)} for threads in candidates}

    def _fill(self, benches: Mapping[Numerics, Bench]) -> int:
        """Fills sequence 0 of all benches to the same depth, which it returns. It is prefilled with the last
        weights (converted ones are the fastest) and copied to the others: the time of a call doesn't depend
        on the values."""
        sources = {tried.flash_attention: bench for tried, bench in benches.items()}
        depth, spent = 0, dict.fromkeys(sources, 0.0)
        while depth < self.least_depth or (depth + FILL <= MOST_DEPTH and max(spent.values()) < FILL_MS):
            for on, bench in sources.items():
                spent[on] += bench.extend(FILL)
            depth += FILL
        for tried, bench in benches.items():
            source = sources[tried.flash_attention]
            if bench is not source:
                bench.trial.restore(0, source.trial.save(0))
                bench.depth[0] = depth
        return depth

    def _time_hits(self, benches: Mapping[Numerics, Bench], depth: int) -> dict[Numerics, dict[int, float]]:
        actions = {(tried, n): bench.timing(n) for tried, bench in benches.items() for n in (1, SUFFIX)}
        names = {(tried, n): f"{_tokens(n)} after {depth}{self._with(tried)}" for tried, n in actions}
        times = self._times(actions, names, HITS_MS)
        return {tried: {n: times[tried, n] for n in (1, SUFFIX)} for tried in benches}

    def _time_prefill(self, bench: Bench, depth: int) -> tuple[int, list[Sample]]:
        """The ubatch, and the times of calls of several sizes at this depth and at depth 0."""
        first = bench.time(UBATCHES[0])
        sizes = [n for n in UBATCHES if n == UBATCHES[0] or first * n / UBATCHES[0] <= CALL_MS]
        actions = {(depth, n): bench.timing(n) for n in sizes}
        actions |= {(0, n): bench.timing(n, [1]) for n in (1, *sizes[:3])}
        suffix = f" at once{self._with(bench.shape.numerics)}"
        names = {(start, n): f"{_tokens(n)} after {start}{suffix}" for start, n in actions}
        times = self._times(actions, names, UBATCH_MS)
        speeds = {n: n / times[depth, n] for n in sizes}
        ubatch = next(n for n in sizes if speeds[n] >= NEAR_BEST * max(speeds.values()))
        return ubatch, [Sample(n, start + n, ms) for (start, n), ms in times.items()]

    def _choose_layout(self, bench: Bench, depth: int, threads: int) -> int:
        if not self.trials.can_share:
            return 0
        state = bench.trial.save(0)
        bench.trial.close()
        seqs = range(LAYOUT_SEQUENCES)
        benches = {
            (start, shared): self._layout(state, start, shared, threads, bench.shape.numerics)
            for start in (0, depth)
            for shared in (False, True)
        }
        for prepared in benches.values():
            prepared.time(1, seqs)
        actions = {key: layout.timing(1, seqs) for key, layout in benches.items()}
        each = {True: "sharing their prefix", False: "each with its own"}
        suffix, sequences = self._with(bench.shape.numerics), f"1 token each of {len(seqs)} sequences"
        names = {(n, shared): f"{sequences} after {n}, {each[shared]}{suffix}" for n, shared in actions}
        return break_even(depth, self._times(actions, names, LAYOUT_MS))

    def _with(self, numerics: Numerics) -> str:
        shown = (f", {name.replace('_', ' ')} {value}" for name, value in numerics.shown().items())
        return "".join(shown) + self.suffix

    def _layout(self, state: Any, depth: int, shared: bool, threads: int, chosen: Numerics) -> Bench:
        """A bench with sequences of `depth` tokens, in one cache or in streams."""
        room = depth + LAYOUT_ROOM * (LAYOUT_SEQUENCES if shared else 1)
        shape = TrialShape(LAYOUT_SEQUENCES, room, not shared, UBATCHES[0], threads, chosen)
        bench = self._bench(shape)
        self.stack.callback(bench.trial.close)
        for seq in range(LAYOUT_SEQUENCES) if depth else ():
            if shared and seq > 0:
                bench.trial.share(0, seq)
            else:
                bench.trial.restore(seq, state)
            bench.depth[seq] = depth
        return bench


def thread_counts(cpus: int, cores: int | None) -> list[int]:
    """The numbers of threads to try, all CPUs first."""
    return list(dict.fromkeys([cpus, *([cpus // 2] if cpus >= 4 else []), *([cores] if cores else [])]))


def break_even(depth: int, times: Mapping[tuple[int, bool], float]) -> int:
    """The prefix length from which sharing it is faster by the margin, in steps of 64; 0 for never. `times`
    are by (prefix length, shared), at 0 and at `depth`, and taken to be linear between and beyond."""

    def gain(start: int) -> float:
        return MARGIN * times[start, False] - times[start, True]

    per_token = (gain(depth) - gain(0)) / depth
    if per_token <= 0:
        return 64 if gain(depth) > 0 else 0
    length = -gain(0) / per_token
    return max(ceil(length / 64) * 64, 64) if length <= EXTRAPOLATION * depth else 0


def _hit_ms(times: Mapping[int, float]) -> float:
    return times[SUFFIX] + ANSWER * times[1]


def _threads(n: int) -> str:
    return f"{n} thread{'s' if n > 1 else ''}"


def _tokens(n: int) -> str:
    return f"{n} token{'s' if n > 1 else ''}"


def main() -> None:
    # The parent process decides when this one ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=os.environ.get("HEADSTART_LOG_LEVEL", "WARNING").upper())
    settings = msgspec.json.decode(sys.argv[1], type=EngineSettings)
    tuning = measure(settings)
    if tuning.counts and tuning.numerics.weights == "file":
        with suppress(OSError):
            discard(settings.conversions)
    sys.stdout.buffer.write(msgspec.json.encode(tuning))


if __name__ == "__main__":
    main()
