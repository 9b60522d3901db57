"""Arms h and i: what the server costs over bare llama.cpp, and what creating a cache costs over prefill."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from time import perf_counter

from bench.bare import Bare
from bench.client import CHAT, Reply
from bench.crowd import ask_together, keep_all, questions
from bench.lab import QUESTION_TOKENS, Lab, connect
from bench.servers import EIGHT, SINGLE, Headstart, Server, check_hit, engine_of
from bench.texts import Prompt, messages

GENERATED = 64
# Longer, since only the time in which all sequences are running counts.
GENERATED_TOGETHER = 96


def overhead(lab: Lab) -> None:
    """(h) A hit and the tokens after it, over HTTP and in bare llama.cpp. In the latter `ttft_ms` is the
    evaluation of the same new tokens, `token_ms` a turn of the decoding loop. `overhead_ms`: what is not in
    the server's own prompt_ms."""
    prompt = lab.prompt()
    servers = lab.servers(SINGLE)
    for server in servers:
        server.keep(prompt)
    with _bare(lab, shared=False) as bare:
        _hold(lab, bare, prompt, 1)
        for number, contender in lab.turns(_all(servers, bare), short=6, full=20):
            question = lab.question("h", number, QUESTION_TOKENS)
            if isinstance(contender, Bare):
                values = _bare_values(lab, contender, prompt, question)
            else:
                values = _server_values(contender, prompt, question)
            lab.record("h", contender.name, number, **values)
    _eight(lab, prompt)


def _eight(lab: Lab, prompt: Prompt) -> None:
    """8 sequences at once: `token_ms` is the time of a step that makes a token in each."""
    servers = [server for server in lab.servers(EIGHT) if server.name != "llama-server"]
    for server in servers:
        keep_all(server, [prompt] * EIGHT.clients)
    with _bare(lab, shared=False) as bare, _bare(lab, shared=True) as shared:
        for loop in (bare, shared):
            _hold(lab, loop, prompt, EIGHT.clients)
        for number, contender in lab.turns(_all(servers, bare, shared), short=2, full=10):
            if isinstance(contender, Bare):
                question = lab.question("h8", number, QUESTION_TOKENS)
                new = lab.writer.chat_tokens(prompt, question)[prompt.tokens :]
                lab.record("h8", contender.name, number, token_ms=contender.decode(new, GENERATED_TOGETHER))
            else:
                asked = questions(lab, "h8", number, 1)
                replies = ask_together(contender, [prompt] * EIGHT.clients, asked, GENERATED_TOGETHER)
                step = step_ms([reply for client in replies for reply in client])
                lab.record("h8", contender.name, number, token_ms=step)


def step_ms(replies: list[Reply]) -> float:
    """The time of one token in each of the streams, while all of them are being generated."""
    begin = max(reply.sent * 1000 + reply.arrivals_ms[0] for reply in replies)
    end = min(reply.sent * 1000 + reply.arrivals_ms[-1] for reply in replies)
    tokens = 0.0
    for reply in replies:
        arrived = sum(begin < reply.sent * 1000 + at <= end for at in reply.arrivals_ms)
        # A piece of text may be more than one token.
        tokens += arrived * reply.generated / len(reply.arrivals_ms)
    return (end - begin) * len(replies) / tokens


def creation(lab: Lab) -> None:
    """(i) POST /v1/cache of a prompt that is new each time, against prefill of the same tokens: in bare
    llama.cpp, and as two plain requests (a chat with that system prompt, a completion of it)."""
    servers = [server for server in lab.servers(SINGLE) if isinstance(server, Headstart)]
    length = lab.prompt().tokens
    with _bare(lab, shared=False) as bare:
        for server in servers:
            ways = ("create", "bare", "plain")
            for number, way in lab.turns(ways, short=2, full=6):
                prompt = lab.writer.prompt(length)
                if way == "bare":
                    openings = lab.writer.openings(prompt)
                    lab.record(
                        "i", bare.name, number, create_ms=sum(bare.hold(tokens) for tokens in openings)
                    )
                elif way == "plain":
                    lab.record("i", "headstart plain", number, create_ms=_plain(server, prompt))
                else:
                    lab.record("i", server.name, number, create_ms=_create(server, prompt))


def _create(server: Headstart, prompt: Prompt) -> float:
    body = {"cache_name": prompt.name, "prompt": prompt.text}
    with connect(server) as connection:
        started = perf_counter()
        connection.call("POST", f"/v1/cache/{server.model}", body)
        return 1000 * (perf_counter() - started)


def _plain(server: Headstart, prompt: Prompt) -> float:
    always = {"model": server.model, "cache_prompt": False, "max_tokens": 1}
    with connect(server) as connection:
        chat = connection.ask(CHAT, always | {"messages": messages(prompt.text, "?")})
        text = connection.ask("/v1/completions", always | {"prompt": prompt.text})
    return chat.total_ms + text.total_ms


def _server_values(server: Server, prompt: Prompt, question: str) -> dict[str, float]:
    with connect(server) as connection:
        reply = connection.ask(CHAT, {"max_tokens": GENERATED, **server.hit(prompt, question)})
    check_hit(reply, prompt)
    return {
        "ttft_ms": reply.ttft_ms,
        "token_ms": reply.token_ms,
        "overhead_ms": reply.ttft_ms - reply.timings["prompt_ms"],
    }


def _bare_values(lab: Lab, bare: Bare, prompt: Prompt, question: str) -> dict[str, float]:
    new = lab.writer.chat_tokens(prompt, question)[prompt.tokens :]
    return {"ttft_ms": bare.suffix(new), "token_ms": bare.decode(new, GENERATED)}


def _all(servers: list[Server], *bare: Bare) -> list[Server | Bare]:
    return [*servers, *bare]


def _hold(lab: Lab, bare: Bare, prompt: Prompt, sequences: int) -> None:
    tokens = lab.writer.chat_tokens(prompt, "x")[: prompt.tokens]
    bare.hold(tokens, sequences)


@contextmanager
def _bare(lab: Lab, *, shared: bool) -> Iterator[Bare]:
    with ExitStack() as stack:
        bare = Bare(engine_of(lab.host), lab.host.threads, shared=shared)
        stack.callback(bare.close)
        yield bare
