"""`python -m bench.hostile`: how long /health takes while hostile and large bodies come on all sides."""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import tempfile
import threading
from pathlib import Path
from time import monotonic, perf_counter, sleep

from bench.process import ServerProcess, free_port
from bench.statistics import percentile

TARGET_MS = 250
USER = {"role": "user", "content": "a"}


def bodies() -> list[tuple[str, bytes]]:
    """Refused ones, and the largest that are not."""
    chat = {"model": "toy", "max_tokens": 1}
    return [
        ("/v1/chat/completions", b'{"messages": [' + b"{}," * 500_000 + b"{}]}"),
        ("/v1/chat/completions", b"{" + b",".join(b'"k%d": 1' % i for i in range(1_000_000)) + b"}"),
        ("/v1/chat/completions", b'{"messages": ' + b"[" * 100_000),
        ("/v1/chat/completions", json.dumps(chat | {"messages": [USER] * 10_000}).encode()),
        ("/v1/messages", json.dumps(chat | {"messages": [USER] * 10_000}).encode()),
        ("/v1/completions", json.dumps({"model": "toy", "prompt": [5] * 300_000}).encode()),
        ("/v1/embeddings", json.dumps({"model": "toy", "input": "a", "x": [{}] * 49_000}).encode()),
        ("/v1/completions", json.dumps({"model": "toy", "prompt": "a" * 15_000_000}).encode()),
    ]


def _ask(port: int, method: str, path: str, body: bytes | None = None) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request(method, path, body)
        return len(connection.getresponse().read())
    finally:
        connection.close()


def _attack(port: int, kinds: list[tuple[str, bytes]], stop: threading.Event) -> None:
    while not stop.is_set():
        for path, body in kinds:
            if not stop.is_set():
                _ask(port, "POST", path, body)


def measure(port: int, clients: int, seconds: float) -> list[float]:
    """Milliseconds of requests to /health, one after the other, each with a connection of its own."""
    stop = threading.Event()
    kinds = bodies()
    threads = [
        threading.Thread(target=_attack, args=(port, kinds[i:] + kinds[:i], stop)) for i in range(clients)
    ]
    for thread in threads:
        thread.start()
    took, end = [], monotonic() + seconds
    while monotonic() < end:
        began = perf_counter()
        _ask(port, "GET", "/health")
        took.append((perf_counter() - began) * 1e3)
        sleep(0.02)
    stop.set()
    for thread in threads:
        thread.join()
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        flags = ["--model", "toy=toy:", "--port", str(port), "--cache-dir", f"{folder}/cache"]
        command = [sys.executable, "-m", "headstart", "serve", *flags]
        server = ServerProcess(command, port, Path(folder) / "log", {"HEADSTART_TUNE": "false"})
        try:
            for clients in (0, options.clients):
                took = measure(port, clients, options.seconds)
                figures = ", ".join(f"p{round(100 * p)} {percentile(took, p):.0f} ms" for p in (0.5, 0.99))
                print(f"{clients} hostile clients: /health {figures}, longest {max(took):.0f} ms")
        finally:
            server.stop()
    print(f"target: p99 below {TARGET_MS} ms")


if __name__ == "__main__":
    main()
