"""Arm j: memory of a server and its children, at rest and for each resident prompt."""

from __future__ import annotations

from bench.client import CHAT
from bench.lab import Lab, connect
from bench.servers import EIGHT

PROMPTS = 4


def taken(lab: Lab) -> None:
    """(j) Memory after a first short request, and what each resident prompt of 1,079 tokens adds to it.
    Headstart has 8 slots of its usual size, llama-server 4 in 8,192 cells as it comes and 8 of 2,048 at its
    best."""
    lab.stop()
    prompts = [lab.prompt(lab.prompt().tokens - number) for number in range(1, PROMPTS + 1)]
    empty = lab.prompt(64)
    for name in lab.contenders:
        with lab.server(name, EIGHT) as server:
            with connect(server) as connection:
                connection.ask(CHAT, server.cold(empty, "Hello?") | {"max_tokens": 4})
            before = server.process.memory_mb()
            for slot, prompt in enumerate(prompts):
                server.keep(prompt, slot)
            after = server.process.memory_mb()
            rest = {f"rest_{key}": value for key, value in before.items()}
            each = {f"prompt_{key}": (after[key] - before[key]) / PROMPTS for key in before}
            lab.record("j", name, 0, **rest, **each)
