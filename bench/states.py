"""How fast states are saved, cut into blocks, joined and restored, in this process.

`python -m bench.states [--model FILE] [--tokens N]`: prefills a slot once and prints the best of several
rounds in GB/s of the whole state, with flash attention and without (where V is transposed).
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Callable, Iterable
from time import perf_counter

from headstart.engine.kinds import engine_kind
from headstart.engine.model import Model, Piece
from headstart.model_files import embedded_model
from headstart.numerics import Numerics
from headstart.protocol import EngineSettings

BLOCK, CHUNK = 256, 256
ROUNDS = 7


class Bench:
    def __init__(self, model: str, n_tokens: int, *, flash_attention: bool) -> None:
        numerics = Numerics(flash_attention=flash_attention)
        threads = len(os.sched_getaffinity(0))
        settings = EngineSettings(model, 2, n_tokens, threads, CHUNK, numerics=numerics)
        self.model: Model = engine_kind(model).load(settings)
        self.n_tokens = n_tokens
        tokens = [random.Random(1).randrange(100, 900) for _ in range(n_tokens)]
        for at in range(0, n_tokens, CHUNK):
            self.model.evaluate([Piece(0, at, tokens[at : at + CHUNK], sample=False)])

    def run(self) -> str:
        slices = self.model.slices
        if slices is None:
            return "states of this model can't be cut"
        state = self.model.save(0)
        n_cells = slices.n_cells(state)
        ends = [(at, min(at + BLOCK, n_cells)) for at in range(0, n_cells, BLOCK)]
        blocks = [slices.cut(state, *range_) for range_ in ends]
        checkpoint = slices.checkpoint(state)

        def join() -> tuple[memoryview, int, int]:
            return slices.join(blocks, self.n_tokens, checkpoint)

        def restore(joined: tuple[memoryview, int, int]) -> None:
            assert self.model.restore(1, *joined)

        def once() -> Iterable[tuple[str, float]]:
            self.model.clear(1)
            yield "save", _seconds(lambda: self.model.save(0))
            yield "cut", _seconds(lambda: [slices.cut(state, *range_) for range_ in ends])
            yield "join", _seconds(join)
            joined = join()
            yield "restore", _seconds(lambda: restore(joined))

        rounds = [dict(once()) for _ in range(ROUNDS)]
        best = {name: len(state) / 1e9 / min(seconds[name] for seconds in rounds) for name in rounds[0]}
        figures = ", ".join(f"{name} {speed:.1f}" for name, speed in best.items())
        return f"{len(state) / 1e6:.0f} MB: {figures} GB/s"


def _seconds(call: Callable[[], object]) -> float:
    started = perf_counter()
    call()
    return perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.states", description=__doc__)
    parser.add_argument("--model", default=embedded_model())
    parser.add_argument("--tokens", type=int, default=1536)
    chosen = parser.parse_args()
    for flash_attention in (True, False):
        bench = Bench(chosen.model, chosen.tokens, flash_attention=flash_attention)
        print(f"flash attention {'on' if flash_attention else 'off'}, {bench.run()}", flush=True)


if __name__ == "__main__":
    main()
