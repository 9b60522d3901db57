"""The two servers that are compared, behind one interface: `Headstart` and `LlamaServer`.

llama-server as it comes: only the model, the address, the threads and the folder for slot files are given.
Its own choices are 4 slots in one unified KV cache, flash attention on, and copies of idle slots in up to
8 GiB of memory. With its best settings: flash attention off, as many slots as clients, each with a KV stream
of its own and addressed by `id_slot`, no copies of idle slots (`--cache-ram 0`).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Protocol

from bench.client import CHAT, BenchFailed, Connection, Json, Reply
from bench.process import ServerProcess, free_port
from bench.texts import Prompt, messages
from headstart.engine.llama.converted_weights import DIRECTORY
from headstart.engine.tuning.constant import DEFAULT_CHUNK
from headstart.numerics import DEFAULT
from headstart.service.models.tuning_store import Tunings

MODEL = "bench"


@dataclass(frozen=True)
class Load:
    """How a server is to be used: requests at once, and tokens each may have."""

    clients: int
    ctx: int


SINGLE = Load(1, 8192)
EIGHT = Load(8, 2048)


@dataclass(frozen=True)
class Host:
    """What all servers of a run have in common. `directory` is where they keep their states and logs.
    `weights`: with which Headstart is told to compute; "" leaves the choice to it."""

    model: str
    threads: int
    directory: Path
    peer: Path
    weights: str = ""


class Server(Protocol):
    """A running server. All methods raise BenchFailed."""

    name: str
    process: ServerProcess

    @property
    def states(self) -> Path:
        """The folder of the files with states."""

    def close(self) -> None:
        """Stops the server."""

    def keep(self, prompt: Prompt, slot: int = 0) -> None:
        """The prompt's state is resident afterwards, and in a file."""

    def hit(self, prompt: Prompt, question: str, slot: int = 0) -> Json:
        """The body of a chat that is to start from the state."""

    def cold(self, prompt: Prompt, question: str) -> Json:
        """The body of the same chat, to be computed anew."""

    def evict(self) -> None:
        """The states are in their files only afterwards."""

    def restore(self, prompt: Prompt) -> float:
        """Does what must be done before a hit after `evict`; milliseconds."""


class Headstart:
    """As it comes; the number and size of slots are given only where there are more clients than slots."""

    name = "headstart"
    model = MODEL

    def __init__(self, host: Host, load: Load) -> None:
        self.states = host.directory / "headstart"
        port = free_port()
        command = [
            sys.executable,
            "-P",
            "-m",
            "headstart",
            "serve",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ]
        command += ["--cache-dir", str(self.states), "--model", f"{MODEL}={host.model}"]
        if load.clients > 1:
            command += ["--slots", str(load.clients), "--ctx", str(load.ctx)]
        env = {"HEADSTART_THREADS": str(host.threads)}
        # The arms tell hits of cache files from computing, so nothing else is kept.
        env |= {"HEADSTART_STATE_MEMORY_MB": "0", "HEADSTART_STATE_DISK_MB": "0"}
        if host.weights:
            env["HEADSTART_WEIGHTS"] = host.weights
        self.process = ServerProcess(command, port, host.directory / "headstart.log", env)
        self._connection = Connection(port)

    def close(self) -> None:
        self._connection.close()
        self.process.stop()

    def keep(self, prompt: Prompt, slot: int = 0) -> None:
        body = {"cache_name": prompt.name, "prompt": prompt.text, "for": ["chat"]}
        self._connection.call("POST", f"/v1/cache/{MODEL}", body)
        # Building leaves the state in a file; the first use brings it into memory.
        self._connection.ask(CHAT, self.hit(prompt, "What comes first?") | {"max_tokens": 1})

    def hit(self, prompt: Prompt, question: str, slot: int = 0) -> Json:
        asked = [{"role": "user", "content": question}]
        return {"model": MODEL, "use_cache": prompt.name, "messages": asked}

    def cold(self, prompt: Prompt, question: str) -> Json:
        return {"model": MODEL, "messages": messages(prompt.text, question), "cache_prompt": False}

    def evict(self) -> None:
        filler = {"model": MODEL, "prompt": "1, 2, 3,", "cache_prompt": False, "max_tokens": 1}
        for _ in range(self._slots()):
            self._connection.ask("/v1/completions", filler)

    def restore(self, prompt: Prompt) -> float:
        """Nothing: the request itself does it."""
        return 0.0

    def _slots(self) -> int:
        return int(self._connection.call("GET", f"/v1/models/{MODEL}")["slots"])


@dataclass(frozen=True)
class Engine:
    """What Headstart's engine was run with."""

    model: str
    chunk: int
    flash_attention: bool


def engine_of(host: Host) -> Engine:
    """As Headstart, which must have been started once, measured or was told. Raises BenchFailed."""
    states = host.directory / Headstart.name
    tunings = Tunings(states)
    if not tunings.path.exists():
        raise BenchFailed("it is not known what the engine was run with")
    known = tunings.known()
    if not known:
        # What was measured is in doubt: it runs with the defaults.
        return Engine(host.model, DEFAULT_CHUNK, bool(DEFAULT.flash_attention))
    tuning = known[-1].tuning
    converted = [*(states / DIRECTORY).glob("*.gguf")]
    model = str(converted[0]) if tuning.numerics.weights == "q8_0" and converted else host.model
    return Engine(model, tuning.ubatch, bool(tuning.numerics.flash_attention))


class LlamaServer:
    """llama.cpp's own server, as it comes or, where `best`, with the settings that suit the load best."""

    def __init__(self, host: Host, load: Load, *, best: bool) -> None:
        self.name = "llama-server best" if best else "llama-server"
        self.best = best
        # A slot's file fits only servers with as many slots as the one that wrote it.
        self.states = host.directory / f"{self.name}-{load.clients}".replace(" ", "-")
        self.states.mkdir(exist_ok=True)
        port = free_port()
        command = [str(host.peer), "--model", host.model, "--host", "127.0.0.1", "--port", str(port)]
        command += ["--threads", str(host.threads), "--slot-save-path", str(self.states)]
        command += best_settings(load) if best else []
        self.process = ServerProcess(command, port, self.states / "server.log", {})
        self._connection = Connection(port)

    def close(self) -> None:
        self._connection.close()
        self.process.stop()

    def keep(self, prompt: Prompt, slot: int = 0) -> None:
        saved = self.states / f"{prompt.name}.bin"
        if saved.exists() and self.best:
            self._slot("restore", prompt, slot)
            return
        warming = self.hit(prompt, "What comes first?", slot) | {"max_tokens": 1}
        if saved.exists():
            self._connection.ask(CHAT, warming)
            return
        # As it comes there are 4 slots; the one to be saved has to be known.
        slot = slot if self.best else slot % 4
        self._connection.ask(CHAT, warming | {"id_slot": slot})
        self._slot("save", prompt, slot)

    def hit(self, prompt: Prompt, question: str, slot: int = 0) -> Json:
        body = {"messages": messages(prompt.text, question), "cache_prompt": True}
        return body | ({"id_slot": slot} if self.best else {})

    def cold(self, prompt: Prompt, question: str) -> Json:
        return self.hit(prompt, question) | {"cache_prompt": False}

    def evict(self) -> None:
        self._connection.call("POST", "/slots/0?action=erase", {})

    def restore(self, prompt: Prompt) -> float:
        started = perf_counter()
        self._slot("restore", prompt, 0)
        return 1000 * (perf_counter() - started)

    def _slot(self, action: str, prompt: Prompt, slot: int) -> None:
        answer = self._connection.call(
            "POST", f"/slots/{slot}?action={action}", {"filename": f"{prompt.name}.bin"}
        )
        if not answer.get("n_saved", answer.get("n_restored")):
            raise BenchFailed(f"{self.name} could not {action} a slot: {answer}")


def best_settings(load: Load) -> list[str]:
    """What llama-server is fastest with on a CPU under this load."""
    # Alone, a second slot keeps prompts that share nothing away from the state in the first.
    slots = max(load.clients, 2)
    fixed = ["--flash-attn", "off", "--no-kv-unified", "--cache-ram", "0"]
    return [*fixed, "--parallel", str(slots), "--ctx-size", str(slots * load.ctx)]


def check_hit(reply: Reply, prompt: Prompt, source: str | None = None) -> None:
    """Raises BenchFailed unless the server evaluated what is new after `prompt` and nothing else, starting
    from the state that lay in `source`, where the server tells that."""
    new = reply.prompt_tokens - prompt.tokens
    # The last token of what chats have in common is evaluated by the one and kept by the other.
    if not new - 2 <= reply.evaluated <= new:
        raise BenchFailed(f"no hit: {reply.evaluated} tokens were evaluated instead of {new}")
    told = reply.timings.get("cache_source", source)
    if source and told != source:
        raise BenchFailed(f"the state came from {told!r} instead of {source!r}")


def check_cold(reply: Reply) -> None:
    """Raises BenchFailed unless every prompt token was evaluated."""
    if reply.evaluated != reply.prompt_tokens:
        raise BenchFailed(f"{reply.prompt_tokens} prompt tokens, but {reply.evaluated} were evaluated")
