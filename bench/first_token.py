"""Time to the first text with a cache and without, as a streaming client sees it: `make bench`.

SmolLM2, a system prompt of about 1,100 tokens and a question of about 20. Three ways, taken in turn so that
other work on the machine slows all of them down: every token evaluated; the cache, its state still in a slot;
the cache after a restart of the server, its hash checked and its state read from the file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from headstart.cli.examples import long_example
from headstart.cli.local import own_server

MODEL = "smollm2"
NAME = "bench"


@dataclass(frozen=True)
class Answer:
    """Seconds to the first text, and what the engine says of it."""

    seconds: float
    timings: dict[str, Any]


@contextmanager
def server(cache_dir: Path) -> Iterator[httpx.Client]:
    """A client of a server of its own on this cache directory."""
    with own_server("--cache-dir", str(cache_dir)) as url, httpx.Client(base_url=url, timeout=300) as http:
        yield http


def ask(http: httpx.Client, **fields: Any) -> Answer:
    """One greedy streamed chat of 16 tokens."""
    body = {"model": MODEL, "stream": True, "temperature": 0, "max_tokens": 16, **fields}
    first = None
    timings: dict[str, Any] = {}
    began = time.perf_counter()
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            timings = event.get("timings", timings)
            if first is None and event["choices"][0]["delta"].get("content"):
                first = time.perf_counter() - began
    assert first is not None, "the answer is empty"
    return Answer(first, timings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    example = long_example()
    messages = list(example.new.after(NAME)["messages"])
    in_full = [{"role": "system", "content": example.opening}, *messages]
    ways: dict[str, list[Answer]] = {"without": [], "cache, in a slot": [], "cache, after a restart": []}
    with tempfile.TemporaryDirectory() as directory:
        caches = Path(directory) / "cache"
        with server(caches) as http:
            created = http.post(f"/v1/cache/{MODEL}", json={"cache_name": NAME, "prompt": example.opening})
            created.raise_for_status()
        for _ in range(rounds):
            with server(caches) as http:
                ways["cache, after a restart"].append(ask(http, messages=messages, use_cache=NAME))
                ways["without"].append(ask(http, messages=in_full, cache_prompt=False))
                ask(http, messages=messages, use_cache=NAME)
                ways["cache, in a slot"].append(ask(http, messages=messages, use_cache=NAME))
    show(ways)


def show(ways: dict[str, list[Answer]]) -> None:
    base = median(answer.seconds for answer in ways["without"])
    print(f"{'':24} {'median':>9} {'min':>9} {'max':>9} {'ratio':>7} {'evaluated':>10} {'restore':>9}")
    for way, answers in ways.items():
        ms = sorted(1000 * answer.seconds for answer in answers)
        middle = median(ms)
        evaluated = {answer.timings["prompt_n"] for answer in answers}
        restore = median(answer.timings["restore_ms"] for answer in answers)
        print(
            f"{way:24} {middle:6.0f} ms {ms[0]:6.0f} ms {ms[-1]:6.0f} ms {middle / 1000 / base:7.3f} "
            f"{'/'.join(map(str, sorted(evaluated))):>10} {restore:6.1f} ms"
        )


if __name__ == "__main__":
    main()
