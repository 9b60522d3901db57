"""Arms a to d and g: time to the first token of one client, everything else being idle."""

from __future__ import annotations

from time import perf_counter

from bench.client import CHAT, Reply
from bench.lab import QUESTION_TOKENS, Lab, connect
from bench.pages import drop
from bench.servers import SINGLE, Server, check_cold, check_hit
from bench.texts import Prompt

ANSWER_TOKENS = 8


def cold(lab: Lab) -> None:
    """(a) A system prompt no server has seen before, every token evaluated."""
    with lab.same_prompts() as saw:
        for number, server in lab.turns(lab.servers(SINGLE), short=3, full=10):
            prompt = lab.new_prompt("a", number)
            reply = _ask(server, server.cold(prompt, lab.question("a", number, QUESTION_TOKENS)))
            check_cold(reply)
            saw(number, reply.prompt_tokens)
            lab.record("a", server.name, number, ttft_ms=reply.ttft_ms, prompt_n=reply.evaluated)


def resident(lab: Lab) -> None:
    """(b) A hit whose state is in the server's memory."""
    _hits(lab, "b", lab.servers(SINGLE), lab.prompt(), QUESTION_TOKENS, short=8, full=30)


def restored(lab: Lab) -> None:
    """(c) A hit whose state is only in its file, which the page cache has. For llama-server the time includes
    the request that restores the slot."""
    servers = lab.servers(SINGLE)
    prompt = lab.prompt()
    for server in servers:
        server.keep(prompt)
    with lab.same_prompts() as saw:
        for number, server in lab.turns(servers, short=6, full=20):
            server.evict()
            waited = server.restore(prompt)
            reply = _ask(server, server.hit(prompt, lab.question("c", number, QUESTION_TOKENS)))
            check_hit(reply, prompt, "file")
            saw(number, reply.prompt_tokens)
            lab.record(
                "c", server.name, number, ttft_ms=waited + reply.ttft_ms, restore_ms=_restore(reply, waited)
            )


def restarted(lab: Lab) -> None:
    """(d) A hit as the first request after a restart: `ttft_ms` of the request (and of the slot restore for
    llama-server), `start_ms` until the server says it is ready, `total_ms` from its start to the first token.
    Then the same with the weights and states dropped from the page cache (arm d-cold)."""
    prompt = lab.prompt()
    for server in lab.servers(SINGLE):
        server.keep(prompt)
    lab.stop()
    for number, name in lab.turns(lab.contenders, short=3, full=8):
        for arm in ("d", "d-cold"):
            if arm == "d-cold":
                drop(lab.host.model, lab.host.directory)
            began = perf_counter()
            with lab.server(name, SINGLE) as server:
                waited = server.restore(prompt)
                asked = 1000 * (perf_counter() - began)
                reply = _ask(server, server.hit(prompt, lab.question("d", number, QUESTION_TOKENS)))
                check_hit(reply, prompt, "file")
                lab.record(
                    arm,
                    name,
                    number,
                    ttft_ms=waited + reply.ttft_ms,
                    start_ms=server.process.start_ms,
                    total_ms=asked + reply.ttft_ms,
                )


def sweep(lab: Lab) -> None:
    """(g) Resident hits over lengths of the prompt and the question."""
    prefixes = (256, 512, 1024, 2048, 4096, 7000) if lab.full else (256, 2048)
    suffixes = (16, 32, 64, 128, 256, 512) if lab.full else (16, 256)
    for prefix in prefixes:
        for suffix in suffixes:
            servers = lab.tuned_servers(SINGLE)
            _hits(lab, f"g {prefix}+{suffix}", servers, lab.prompt(prefix), suffix, short=3, full=5)


def _hits(
    lab: Lab, arm: str, servers: list[Server], prompt: Prompt, suffix: int, short: int, full: int
) -> None:
    for server in servers:
        server.keep(prompt)
    with lab.same_prompts() as saw:
        for number, server in lab.turns(servers, short, full):
            reply = _ask(server, server.hit(prompt, lab.question(arm, number, suffix)))
            check_hit(reply, prompt, "slot")
            saw(number, reply.prompt_tokens)
            lab.record(
                arm,
                server.name,
                number,
                ttft_ms=reply.ttft_ms,
                prompt_n=reply.evaluated,
                overhead_ms=reply.ttft_ms - reply.timings["prompt_ms"],
            )


def _restore(reply: Reply, waited: float) -> float:
    return float(reply.timings.get("restore_ms", waited))


def _ask(server: Server, body: dict[str, object]) -> Reply:
    with connect(server) as connection:
        return connection.ask(CHAT, {"max_tokens": ANSWER_TOKENS, **body})
