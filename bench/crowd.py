"""Arms e and f: 8 clients at once, on one prompt and on a prompt each."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from time import perf_counter

from bench.client import CHAT, Reply
from bench.lab import QUESTION_TOKENS, Lab, connect
from bench.servers import EIGHT, Server, check_hit
from bench.statistics import percentile
from bench.texts import Prompt

CLIENTS = EIGHT.clients
ANSWER_TOKENS = 32


def one_prompt(lab: Lab) -> None:
    """(e) 8 clients ask different questions after the same prompt, 32 tokens each."""
    prompt = lab.prompt()
    _measure(lab, "e", lab.servers(EIGHT), [prompt] * CLIENTS, short=3)


def own_prompts(lab: Lab) -> None:
    """(f) 8 clients, each after a prompt of its own."""
    prompts = [lab.prompt(lab.prompt().tokens - number) for number in range(1, CLIENTS + 1)]
    _measure(lab, "f", lab.tuned_servers(EIGHT), prompts, short=2)


def _measure(lab: Lab, arm: str, servers: Sequence[Server], prompts: Sequence[Prompt], short: int) -> None:
    for server in servers:
        keep_all(server, prompts)
    waves = 4 if lab.full else 2
    for number, server in lab.turns(servers, short=short, full=8):
        asked = questions(lab, arm, number, waves)
        started = perf_counter()
        replies = ask_together(server, prompts, asked, ANSWER_TOKENS)
        seconds = perf_counter() - started
        _check(server, prompts, replies)
        flat = [reply for client in replies for reply in client]
        first = [reply.ttft_ms for reply in flat]
        generated = sum(reply.generated for reply in flat)
        lab.record(
            arm,
            server.name,
            number,
            requests_per_s=len(flat) / seconds,
            tokens_per_s=generated / seconds,
            ttft_p50_ms=percentile(first, 0.5),
            ttft_p95_ms=percentile(first, 0.95),
            tokens_per_answer=generated / len(flat),
            hits=sum(reply.evaluated < prompts[0].tokens / 2 for reply in flat) / len(flat),
        )


def questions(lab: Lab, arm: str, number: int, waves: int) -> list[list[str]]:
    """Of each client, one a wave; the same for all servers in a round."""
    return [
        [lab.question(f"{arm} {slot}.{wave}", number, QUESTION_TOKENS) for wave in range(waves)]
        for slot in range(CLIENTS)
    ]


def keep_all(server: Server, prompts: Sequence[Prompt]) -> None:
    for slot, prompt in enumerate(prompts):
        server.keep(prompt, slot)


def ask_together(
    server: Server, prompts: Sequence[Prompt], asked: Sequence[Sequence[str]], max_tokens: int
) -> list[list[Reply]]:
    """Each client asks its questions one after the other; all begin together."""
    barrier = Barrier(len(prompts))

    def client(slot: int) -> list[Reply]:
        bodies = [server.hit(prompts[slot], question, slot) for question in asked[slot]]
        barrier.wait()
        with connect(server) as connection:
            return [connection.ask(CHAT, {"max_tokens": max_tokens, **body}) for body in bodies]

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(client, range(len(prompts))))


def _check(server: Server, prompts: Sequence[Prompt], replies: Sequence[Sequence[Reply]]) -> None:
    # llama-server as it comes has fewer slots than there are clients: its misses are part of the result.
    if server.name != "llama-server":
        for prompt, client in zip(prompts, replies, strict=True):
            for reply in client:
                check_hit(reply, prompt)
