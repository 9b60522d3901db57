"""Measures what a model is run with on this machine: `python -m headstart.engine.tuning SETTINGS` writes a
Tuning as JSON.

Alternatives are timed in turn and compared by their medians, so that a noisy moment hurts all of them.
A model that is slow here is measured over fewer tokens, not for longer.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from math import ceil
from statistics import median
from typing import Any, TypeVar

import msgspec

from headstart.engine.costs import Sample, fit
from headstart.engine.model import ModelError
from headstart.engine.trials import Span, Trial, Trials, TrialShape
from headstart.machine import available_cpus, physical_cores
from headstart.messages import EngineSettings, Tuning

Key = TypeVar("Key")

# A hit: new tokens after the prefix, and tokens of the answer.
SUFFIX, ANSWER = 20, 32
# An alternative to the default has to be faster by this much.
MARGIN = 0.97
UBATCHES = (16, 32, 64, 128, 256)
NEAR_BEST = 0.95
# Depth at which is measured: what is prefilled in FILL_MS, within these bounds.
LEAST_DEPTH, MOST_DEPTH, FILL = 64, 1024, 64
FILL_MS = 5000
# The longest single call, and what each comparison may take unless one round of it takes longer.
CALL_MS = 1200
THREADS_MS, FLASH_MS, UBATCH_MS, LAYOUT_MS = 1000, 1200, 3000, 600
ROUNDS = 9
LAYOUT_SEQUENCES = 4
LAYOUT_ROOM = 64
# How far the comparison of layouts is trusted beyond the depth at which it was made.
EXTRAPOLATION = 8


class Bench:
    """A trial and the tokens its sequences hold."""

    def __init__(self, trial: Trial, shape: TrialShape) -> None:
        self.trial, self.shape = trial, shape
        self.depth = [0] * shape.sequences

    def extend(self, n: int) -> float:
        """Sequence 0 grows by `n` tokens."""
        ms = self.trial.evaluate([Span(0, self.depth[0], n)])
        self.depth[0] += n
        return ms

    def time(self, n: int, seqs: Sequence[int] = (0,)) -> float:
        """Milliseconds of `n` more tokens for each sequence, which then go again; where a state can't be cut
        they stay, until there is no more room."""
        for seq in seqs:
            if self.depth[seq] + n > self.shape.tokens:
                self.trial.cut(seq, 0)
                self.depth[seq] = 0
        ms = self.trial.evaluate([Span(seq, self.depth[seq], n) for seq in seqs])
        for seq in seqs:
            if not self.trial.cut(seq, self.depth[seq]):
                self.depth[seq] += n
        return ms

    def timing(self, n: int, seqs: Sequence[int] = (0,)) -> Callable[[], float]:
        return lambda: self.time(n, seqs)


def in_turn(actions: Mapping[Key, Callable[[], float]], budget_ms: float) -> dict[Key, float]:
    """The median of each action's times, in rounds of all of them; one round at least."""
    times: dict[Key, list[float]] = {key: [] for key in actions}
    spent = longest = 0.0
    for _ in range(ROUNDS):
        if spent and spent + longest > budget_ms:
            break
        for key, action in actions.items():
            times[key].append(action())
        this = sum(row[-1] for row in times.values())
        spent, longest = spent + this, max(longest, this)
    return {key: median(row) for key, row in times.items()}


def measure(
    path: str,
    threads: int = 0,
    flash_attention: bool | None = None,
    open_trials: Callable[[str], Trials] | None = None,
) -> Tuning:
    """What is fastest for the model at `path`, in about 15 seconds for a small one. `threads` (unless 0) and
    `flash_attention` (unless None) are given; the other is measured all the same. Raises ModelError."""
    trials = (open_trials or _llama_trials)(path)
    try:
        with ExitStack() as stack:
            return Measurement(trials, stack, threads, flash_attention).run()
    finally:
        trials.close()


def _llama_trials(path: str) -> Trials:
    from headstart.engine.llama.trial import LlamaTrials

    return LlamaTrials(path)


class Measurement:
    """One run. `stack` closes what is still open at its end."""

    def __init__(self, trials: Trials, stack: ExitStack, threads: int, flash_attention: bool | None) -> None:
        self.trials, self.stack = trials, stack
        self.threads, self.flash_attention = threads, flash_attention
        self.figures: dict[str, float] = {}

    def run(self) -> Tuning:
        benches = self._benches()
        threads = self._choose_threads(list(benches.values()))
        depth = self._fill(list(benches.values()))
        hits = self._time_hits(benches, depth)
        preferred = min(hits, key=lambda on: _hit_ms(hits[on]) * (MARGIN if on is False else 1))
        chosen = preferred if self.flash_attention is None else self.flash_attention
        for on, bench in benches.items():
            if on != chosen:
                bench.trial.close()
        bench = benches[chosen]
        ubatch, samples = self._time_prefill(bench, depth)
        samples += [Sample(n, depth + n, ms) for n, ms in hits[chosen].items()]
        return Tuning(
            flash_attention=chosen,
            threads=threads,
            ubatch=ubatch,
            **fit(samples)._asdict(),
            share_from=self._choose_layout(bench, depth, threads),
            prefers_flash_attention=preferred,
            measured={name: round(ms, 2) for name, ms in self.figures.items()},
        )

    def _bench(self, shape: TrialShape) -> Bench:
        return Bench(self.trials.trial(shape), shape)

    def _benches(self) -> dict[bool, Bench]:
        """One for each kind of attention. Sequence 0 is to be filled, sequence 1 stays empty."""
        benches: dict[bool, Bench] = {}
        for on in (False, True):
            room = MOST_DEPTH + UBATCHES[-1]
            shape = TrialShape(2, room, True, UBATCHES[-1], self.threads or available_cpus(), on)
            try:
                benches[on] = self._bench(shape)
            except ModelError:
                # There are models that can do without flash attention only, or only with it.
                if on == self.flash_attention or (on and not benches):
                    raise
                continue
            self.stack.callback(benches[on].trial.close)
            # The first call also makes llama.cpp reserve its memory.
            benches[on].time(UBATCHES[0], [1])
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
        times = in_turn(actions, THREADS_MS)
        for (threads, n), ms in times.items():
            self.figures[f"{_tokens(n)}, {threads} threads"] = ms
        return {threads: {n: times[threads, n] for n in (1, SUFFIX)} for threads in candidates}

    def _fill(self, benches: Sequence[Bench]) -> int:
        """Prefills sequence 0 of all benches to the same depth, which it returns."""
        depth, spent = 0, [0.0] * len(benches)
        while depth < LEAST_DEPTH or (depth + FILL <= MOST_DEPTH and max(spent) < FILL_MS):
            for i, bench in enumerate(benches):
                spent[i] += bench.extend(FILL)
            depth += FILL
        return depth

    def _time_hits(self, benches: Mapping[bool, Bench], depth: int) -> dict[bool, dict[int, float]]:
        actions = {(on, n): bench.timing(n) for on, bench in benches.items() for n in (1, SUFFIX)}
        times = in_turn(actions, FLASH_MS)
        for (on, n), ms in times.items():
            self.figures[f"{_tokens(n)} after {depth}, flash attention {'on' if on else 'off'}"] = ms
        return {on: {n: times[on, n] for n in (1, SUFFIX)} for on in benches}

    def _time_prefill(self, bench: Bench, depth: int) -> tuple[int, list[Sample]]:
        """The ubatch, and what calls of several sizes took at this depth and without anything before."""
        first = bench.time(UBATCHES[0])
        sizes = [n for n in UBATCHES if n == UBATCHES[0] or first * n / UBATCHES[0] <= CALL_MS]
        actions = {(depth, n): bench.timing(n) for n in sizes}
        actions |= {(0, n): bench.timing(n, [1]) for n in (1, *sizes[:3])}
        times = in_turn(actions, UBATCH_MS)
        for (start, n), ms in times.items():
            self.figures[f"{_tokens(n)} after {start}"] = ms
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
            (start, shared): self._layout(state, start, shared, threads, bench.shape.flash_attention)
            for start in (0, depth)
            for shared in (False, True)
        }
        for prepared in benches.values():
            prepared.time(1, seqs)
        times = in_turn({key: layout.timing(1, seqs) for key, layout in benches.items()}, LAYOUT_MS)
        for (start, shared), ms in times.items():
            name = "sharing their prefix" if shared else "each with its own"
            self.figures[f"1 token each of {len(seqs)} sequences after {start}, {name}"] = ms
        return break_even(depth, times)

    def _layout(self, state: Any, depth: int, shared: bool, threads: int, flash_attention: bool) -> Bench:
        """Sequences of `depth` tokens, in one cache or in streams."""
        room = depth + LAYOUT_ROOM * (LAYOUT_SEQUENCES if shared else 1)
        shape = TrialShape(LAYOUT_SEQUENCES, room, not shared, UBATCHES[0], threads, flash_attention)
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
    """Numbers of threads worth trying, all CPUs first."""
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


def _tokens(n: int) -> str:
    return f"{n} token{'s' if n > 1 else ''}"


def main() -> None:
    # Whoever started this decides when it ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=os.environ.get("HEADSTART_LOG_LEVEL", "WARNING").upper())
    settings = msgspec.json.decode(sys.argv[1], type=EngineSettings)
    tuning = measure(settings.path, settings.threads, settings.flash_attention)
    sys.stdout.buffer.write(msgspec.json.encode(tuning))


if __name__ == "__main__":
    main()
