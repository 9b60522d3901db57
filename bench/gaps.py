"""Arm l: what running streams notice of a prompt that is being built."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Event

from bench.client import CHAT, BenchFailed
from bench.lab import QUESTION_TOKENS, Lab, connect
from bench.servers import SINGLE, Headstart, Server
from bench.statistics import percentile
from bench.texts import Prompt

BUILT_TOKENS = 4000


def longest_gap(lab: Lab) -> None:
    """(l) The longest gap in a running stream while a prompt of 4,000 tokens is built: POST /v1/cache, for
    llama-server, in the full version, a request that begins with it. `alone`: without that."""
    servers = [server for server in lab.servers(SINGLE) if lab.full or server.name == Headstart.name]
    for number, server in lab.turns(servers, short=1, full=3):
        done = Event()
        done.set()
        alone = _gaps(lab, server, done)
        done.clear()
        with ThreadPoolExecutor(1) as pool:
            building = pool.submit(_build, server, lab.writer.prompt(BUILT_TOKENS), done)
            gaps = _gaps(lab, server, done)
            building.result()
        lab.record(
            "l",
            server.name,
            number,
            gap_ms=max(gaps),
            gap_p50_ms=percentile(gaps, 0.5),
            alone_ms=max(alone),
            alone_p50_ms=percentile(alone, 0.5),
        )


def _build(server: Server, prompt: Prompt, done: Event) -> None:
    try:
        with connect(server) as connection:
            if isinstance(server, Headstart):
                body = {"cache_name": prompt.name, "prompt": prompt.text, "for": ["chat"]}
                connection.call("POST", f"/v1/cache/{server.model}", body)
            else:
                connection.ask(CHAT, server.hit(prompt, "What comes first?", 1) | {"max_tokens": 1})
    finally:
        done.set()


def _gaps(lab: Lab, server: Server, done: Event) -> list[float]:
    """Of streams one after the other until `done`, at least one."""
    gaps: list[float] = []
    prompt = lab.prompt()
    with connect(server) as connection:
        while not gaps or not done.is_set():
            question = lab.writer.question(QUESTION_TOKENS)
            reply = connection.ask(CHAT, {"max_tokens": 128, **server.hit(prompt, question)})
            gaps += reply.gaps_ms
    if len(gaps) < 16:
        raise BenchFailed(f"the streams were too short: {len(gaps)} gaps")
    return gaps
