"""Where the arms run: the contenders' servers, the order of turns, and the samples taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from bench.client import BenchFailed, Connection
from bench.servers import Headstart, Host, LlamaServer, Load, Server
from bench.texts import Prompt, Writer

CONTENDERS = ("headstart", "llama-server", "llama-server best")
PREFIX_TOKENS = 1079
QUESTION_TOKENS = 22
T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """Values that `who` had in a round of an arm, by the name of what was measured."""

    arm: str
    who: str
    round: int
    values: dict[str, float]


@dataclass
class Lab:
    """`rounds` overrides each arm's own number unless it is 0. The servers of one load are up at a time."""

    host: Host
    writer: Writer
    full: bool = False
    rounds: int = 0
    contenders: Sequence[str] = CONTENDERS
    say: Callable[[str], None] = print
    samples: list[Sample] = field(default_factory=list)
    commands: dict[str, str] = field(default_factory=dict)
    _stack: ExitStack = field(default_factory=ExitStack)
    _up: tuple[Load, list[Server]] | None = None
    _kept: dict[int, Prompt] = field(default_factory=dict)
    _new: dict[tuple[str, int], Prompt] = field(default_factory=dict)
    _asked: dict[tuple[str, int], str] = field(default_factory=dict)

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def servers(self, load: Load) -> list[Server]:
        """All contenders' servers for this load, running."""
        if self._up is None or self._up[0] != load:
            self.stop()
            self._up = (
                load,
                [self._stack.enter_context(self.server(name, load)) for name in self.contenders],
            )
        return self._up[1]

    def tuned_servers(self, load: Load) -> list[Server]:
        """In the short version without llama-server as it comes, for arms that would take too long."""
        return [server for server in self.servers(load) if self.full or server.name != CONTENDERS[1]]

    def stop(self) -> None:
        self._stack.close()
        self._up = None

    def server(self, name: str, load: Load) -> AbstractContextManager[Server]:
        """A server of its own, stopped at the end of the block."""
        server = start(name, self.host, load)
        self.commands[f"{name}, clients: {load.clients}"] = server.process.shown
        return _running(server)

    def turns(self, contenders: Sequence[T], short: int, full: int) -> Iterator[tuple[int, T]]:
        """The rounds of an arm: each contender once a round, another one first each time."""
        for number in range(self.rounds or (full if self.full else short)):
            first = number % len(contenders)
            for contender in (*contenders[first:], *contenders[:first]):
                yield number, contender

    def prompt(self, n_tokens: int = PREFIX_TOKENS) -> Prompt:
        """The same one each time."""
        if n_tokens not in self._kept:
            self._kept[n_tokens] = self.writer.prompt(n_tokens)
        return self._kept[n_tokens]

    def new_prompt(self, arm: str, number: int) -> Prompt:
        """One of `prompt()`'s length that no server has seen, the same for all who take part in the round."""
        key = (arm, number)
        if key not in self._new:
            self._new[key] = self.writer.prompt(self.prompt().tokens)
        return self._new[key]

    def question(self, arm: str, number: int, n_tokens: int) -> str:
        """A new one each round of an arm, the same for all who take part."""
        key = (arm, number)
        if key not in self._asked:
            self._asked[key] = self.writer.question(n_tokens)
        return self._asked[key]

    def record(self, arm: str, who: str, number: int, **values: float) -> None:
        self.samples.append(Sample(arm, who, number, values))

    @contextmanager
    def same_prompts(self) -> Iterator[Callable[[int, int], None]]:
        """To be told each round's number of prompt tokens; raises BenchFailed when they differ in a round."""
        seen: dict[int, int] = {}

        def saw(number: int, tokens: int) -> None:
            if seen.setdefault(number, tokens) != tokens:
                raise BenchFailed(f"one server saw {seen[number]} prompt tokens, another one {tokens}")

        yield saw


def start(name: str, host: Host, load: Load) -> Server:
    if name == "headstart":
        return Headstart(host, load)
    return LlamaServer(host, load, best=name.endswith("best"))


def connect(server: Server) -> Connection:
    return Connection(server.process.port)


@contextmanager
def _running(server: Server) -> Iterator[Server]:
    try:
        yield server
    finally:
        server.close()
