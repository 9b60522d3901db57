"""Arm j: memory of a server and its children, at rest and for each resident prompt."""

from __future__ import annotations

import time

from bench.client import CHAT
from bench.lab import Lab, connect
from bench.servers import EIGHT, Server

PROMPTS = 3
IDLE_SECONDS = 2.0


def taken(lab: Lab) -> None:
    """(j) Memory after a first short request, and what each resident prompt of 1,079 tokens adds to it.
    `idle_cpu`: CPUs taken while nothing is asked. All have 8 slots of 2,048 tokens, but llama-server as it
    comes has 4 that share 8,192."""
    lab.stop()
    prompts = [lab.prompt(lab.prompt().tokens - number) for number in range(1, PROMPTS + 1)]
    empty = lab.prompt(64)
    for name in lab.contenders:
        with lab.server(name, EIGHT) as server:
            with connect(server) as connection:
                connection.ask(CHAT, server.cold(empty, "Hello?") | {"max_tokens": 4})
            idle = idle_cpu(server)
            before = server.process.memory_mb()
            for slot, prompt in enumerate(prompts):
                server.keep(prompt, slot)
            after = server.process.memory_mb()
            rest = {f"rest_{key}": value for key, value in before.items()}
            each = {f"prompt_{key}": (after[key] - before[key]) / PROMPTS for key in before}
            lab.record("j", name, 0, **rest, **each, idle_cpu=idle)


def idle_cpu(server: Server) -> float:
    # Threads that wait for each other spin a little after the last request.
    time.sleep(IDLE_SECONDS / 2)
    before = server.process.cpu_seconds()
    time.sleep(IDLE_SECONDS)
    return (server.process.cpu_seconds() - before) / IDLE_SECONDS
