"""Time to the first text with a cache and without, as a streaming client sees it: `make bench`.

SmolLM2, a system prompt of about 1,100 tokens and a question of about 20. Three ways, taken in turn so that
other work on the machine slows all of them down: every token evaluated; the cache, its state still in a slot;
the cache after a restart of the server, its hash checked and its state read from the file.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from headstart.cli.client import Client, cache_path
from headstart.cli.examples import long_example
from headstart.cli.local import own_server
from headstart.cli.measure import Run, timed

NAME = "bench"
BODY = {"model": "smollm2", "max_tokens": 16}


@contextmanager
def server(cache_dir: Path) -> Iterator[Client]:
    """A client of a server of its own on this cache directory."""
    with own_server("--cache-dir", str(cache_dir)) as url, Client(url) as client:
        yield client


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    example = long_example()
    path = example.new.path
    cached = BODY | example.new.after(NAME)
    in_full = BODY | example.new.in_full(example.opening) | {"cache_prompt": False}
    ways: dict[str, list[Run]] = {"without": [], "cache, in a slot": [], "cache, after a restart": []}
    with tempfile.TemporaryDirectory() as directory:
        caches = Path(directory) / "cache"
        with server(caches) as client:
            list(client.events(cache_path("smollm2"), {"cache_name": NAME, "prompt": example.opening}))
        for _ in range(rounds):
            with server(caches) as client:
                ways["cache, after a restart"].append(timed(client, path, cached))
                ways["without"].append(timed(client, path, in_full))
                timed(client, path, cached)
                ways["cache, in a slot"].append(timed(client, path, cached))
    assert all(run.text for runs in ways.values() for run in runs), "an answer is empty"
    show(ways)


def show(ways: dict[str, list[Run]]) -> None:
    base = median(run.ttft_ms for run in ways["without"])
    print(f"{'':24} {'median':>9} {'min':>9} {'max':>9} {'ratio':>7} {'evaluated':>10} {'restore':>9}")
    for way, runs in ways.items():
        ms = sorted(run.ttft_ms for run in runs)
        middle = median(ms)
        evaluated = "/".join(map(str, sorted({run.timings["prompt_n"] for run in runs})))
        restore = median(run.timings["restore_ms"] for run in runs)
        print(
            f"{way:24} {middle:6.0f} ms {ms[0]:6.0f} ms {ms[-1]:6.0f} ms {middle / base:7.3f} "
            f"{evaluated:>10} {restore:6.1f} ms"
        )


if __name__ == "__main__":
    main()
