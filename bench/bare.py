"""llama.cpp without any server: the same tokens through its C interface in a process of its own.

`python -m bench.bare` is that process: one JSON command a line on stdin, one answer a line on stdout. `Bare`
talks to it. Context, threads, weights, batch and attention are those of the engine; `shared` sequences use
one copy of the prefix in a unified KV cache, others have a stream and a copy each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from time import perf_counter
from typing import Any

from bench.servers import Engine

SEQUENCES = 8
CTX = 8192
# The engine's own, see headstart/engine/client.py.
SPIN = {"GOMP_SPINCOUNT": "1000"}


class Bare:
    """A bare llama.cpp with a model loaded. All times are in milliseconds."""

    def __init__(self, engine: Engine, threads: int, *, shared: bool) -> None:
        self.name = "bare shared" if shared else "bare"
        command = [sys.executable, "-m", "bench.bare", engine.model, "--threads", str(threads)]
        command += ["--chunk", str(engine.chunk), *(["--shared"] if shared else [])]
        command += ["--flash-attention"] if engine.flash_attention else []
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**SPIN, **os.environ},
        )
        # Loading must not disturb who is measured first.
        self.hold([0])

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def hold(self, tokens: Sequence[int], sequences: int = 1) -> float:
        """Computes `tokens` as the prefix of that many sequences; how long computing it once took."""
        return self._do("hold", tokens=list(tokens), sequences=sequences)

    def suffix(self, tokens: Sequence[int]) -> float:
        """Evaluates `tokens` after the prefix and picks the next; the prefix is as before afterwards."""
        return self._do("suffix", tokens=list(tokens))

    def decode(self, tokens: Sequence[int], steps: int) -> float:
        """Evaluates `tokens` after the prefix in every sequence, then generates `steps` tokens in each of
        them at once; the time of one step."""
        return self._do("decode", tokens=list(tokens), steps=steps)

    def _do(self, name: str, **arguments: Any) -> float:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps({"do": name, **arguments}).encode() + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise OSError("the bare llama.cpp ended")
        return float(json.loads(line))


class Loop:
    """The other side: everything here is what llama.cpp needs to be told, and greedy sampling."""

    def __init__(self, model: str, threads: int, chunk: int, *, shared: bool, flash_attention: bool) -> None:
        import llama_cpp as lib
        import numpy as np

        self.lib, self.np, self.chunk, self.shared = lib, np, chunk, shared
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(model.encode(), lib.llama_model_default_params())
        params = lib.llama_context_default_params()
        params.n_ctx = CTX if shared else CTX * SEQUENCES
        params.n_batch = params.n_ubatch = max(chunk, SEQUENCES)
        params.n_seq_max = SEQUENCES
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = int(flash_attention)
        params.kv_unified = shared
        self.context = lib.llama_init_from_model(self.model, params)
        self.memory = lib.llama_get_memory(self.context)
        self.n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.batch = lib.llama_batch_init(max(chunk, SEQUENCES), 0, 1)
        self.held = 0
        self.sequences = 1

    def hold(self, tokens: list[int], sequences: int) -> None:
        self.lib.llama_memory_clear(self.memory, True)
        self._prefill(tokens, 0, 0)
        self.held, self.sequences = len(tokens), sequences
        for seq in range(1, sequences):
            self.lib.llama_memory_seq_cp(self.memory, 0, seq, -1, -1)

    def suffix(self, tokens: list[int]) -> None:
        self._prefill(tokens, self.held, 0)

    def prepare(self, tokens: list[int]) -> list[int]:
        return [self._prefill(tokens, self.held, seq) for seq in range(self.sequences)]

    def decode(self, latest: list[int], at: int, steps: int) -> None:
        for step in range(steps):
            self._evaluate([(token, at + step, seq, True) for seq, token in enumerate(latest)])
            latest = [self._best(row) for row in range(len(latest))]

    def forget(self) -> None:
        """What came after the prefix."""
        for seq in range(self.sequences):
            self.lib.llama_memory_seq_rm(self.memory, seq, self.held, -1)

    def _prefill(self, tokens: list[int], at: int, seq: int) -> int:
        for begin in range(0, len(tokens), self.chunk):
            part = tokens[begin : begin + self.chunk]
            last = begin + len(part) == len(tokens)
            rows = [(token, at + begin + i, seq, False) for i, token in enumerate(part)]
            rows[-1] = (*rows[-1][:3], last)
            self._evaluate(rows)
        return self._best(len(part) - 1)

    def _evaluate(self, rows: list[tuple[int, int, int, bool]]) -> None:
        batch = self.batch
        for i, (token, position, seq, logits) in enumerate(rows):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = seq
            batch.logits[i] = logits
        batch.n_tokens = len(rows)
        status = self.lib.llama_decode(self.context, batch)
        assert status == 0, f"llama_decode returned {status}"

    def _best(self, row: int) -> int:
        logits = self.lib.llama_get_logits_ith(self.context, row)
        return int(self.np.ctypeslib.as_array(logits, (self.n_vocab,)).argmax())


def answer(loop: Loop, command: dict[str, Any]) -> float:
    tokens, steps = command["tokens"], 1
    if command["do"] == "hold":
        started = perf_counter()
        loop.hold(tokens, command["sequences"])
        return 1000 * (perf_counter() - started)
    if command["do"] == "suffix":
        started = perf_counter()
        loop.suffix(tokens)
    else:
        latest, steps = loop.prepare(tokens), command["steps"]
        started = perf_counter()
        loop.decode(latest, loop.held + len(tokens), steps)
    taken = 1000 * (perf_counter() - started) / steps
    loop.forget()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--chunk", type=int, required=True)
    parser.add_argument("--shared", action="store_true")
    parser.add_argument("--flash-attention", action="store_true")
    chosen = parser.parse_args()
    loop = Loop(
        chosen.model,
        chosen.threads,
        chosen.chunk,
        shared=chosen.shared,
        flash_attention=chosen.flash_attention,
    )
    for line in sys.stdin:
        print(answer(loop, json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
