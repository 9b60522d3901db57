"""What the engine's loop adds to llama.cpp, without a server and clients on the same CPUs.

`python -m bench.loop`: 8 sequences with one prefix decode in the engine's pool and, in turn, in the same pool
by plain evaluation of as many tokens, in one process. The figures are milliseconds of a step.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import perf_counter

from headstart.caches.cache_file.format import identity_of
from headstart.config.settings import embedded_model
from headstart.engine.core.chunking import Chunking
from headstart.engine.core.engine import CoreEngine
from headstart.engine.kinds import engine_kind
from headstart.engine.model import Piece
from headstart.numerics import DEFAULT
from headstart.protocol import EngineSettings, Finished, Sampling, SaveTo, StateRef, Submit

SEQUENCES = 8
PREFIX, SUFFIX, ANSWER = 1079, 22, 48
CHUNK, CTX = 64, 2048


class Bench:
    def __init__(self, model: str, threads: int, directory: Path) -> None:
        settings = EngineSettings(model, SEQUENCES, CTX, threads, CHUNK, numerics=DEFAULT, share_from=256)
        self.model = engine_kind(model).load(settings)
        self.engine = CoreEngine(self.model, Chunking(CHUNK), lambda: None, share_from=256)
        self.random = random.Random(1)
        self.prefix = self._tokens(PREFIX)
        self.state = self._saved(directory / "state")

    def _tokens(self, n: int) -> list[int]:
        return [self.random.randrange(1000, 40000) for _ in range(n)]

    def _saved(self, path: Path) -> StateRef:
        path.touch()
        save = SaveTo(str(path))
        self.engine.handle(Submit(0, self.prefix, boundary=PREFIX, save_to=save))
        while not any(isinstance(event, Finished) for event in self.engine.step()):
            pass
        stat = path.stat()
        return StateRef(str(path), 0, stat.st_size, PREFIX, identity_of(stat))

    def in_the_loop(self) -> Iterator[float]:
        """Steps in which each sequence gets a token."""
        for number in range(SEQUENCES):
            tokens = [*self.prefix, *self._tokens(SUFFIX)]
            greedy = Sampling(temperature=0)
            request = Submit(1 + number, tokens, PREFIX, ANSWER, sampling=greedy, restore=self.state)
            self.engine.handle(request)
        while self.engine.busy:
            started = perf_counter()
            events = self.engine.step()
            if len(events) == SEQUENCES and not any(isinstance(event, Finished) for event in events):
                yield 1000 * (perf_counter() - started)

    def plain(self) -> Iterator[float]:
        pool = self.engine.scheduler.pool
        assert pool
        slot_ids = [slot.id for slot in pool.slots]
        for slot in pool.slots:
            self.model.clear(slot.id)
            slot.hold([], 0, 0)
            self.model.copy(pool.prefix_slot.id, slot.id, PREFIX)
            self.model.evaluate([Piece(slot.id, PREFIX, self._tokens(SUFFIX), True)])
        for at in range(PREFIX + SUFFIX, PREFIX + SUFFIX + ANSWER):
            pieces = [Piece(slot_id, at, self._tokens(1), True) for slot_id in slot_ids]
            started = perf_counter()
            self.model.evaluate(pieces)
            yield 1000 * (perf_counter() - started)
        for slot_id in slot_ids:
            self.model.clear(slot_id)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.loop", description=__doc__)
    parser.add_argument("--model", default="", help="a GGUF file; else the embedded model")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        bench = Bench(chosen.model or embedded_model(), chosen.threads, Path(directory))
        list(bench.in_the_loop())
        rounds = [(median(bench.in_the_loop()), median(bench.plain())) for _ in range(chosen.rounds)]
    for loop, plain in rounds:
        print(f"a step in the loop {loop:.1f} ms, plain {plain:.1f} ms, ratio {loop / plain:.3f}")
    print(f"median ratio {median(loop / plain for loop, plain in rounds):.3f}")


if __name__ == "__main__":
    main()
