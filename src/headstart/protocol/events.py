"""Messages from a worker."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from headstart.numerics import Tuning
from headstart.protocol.settings import Sampling

SequenceEnd = Literal["stop", "length", "saved", "cancelled"]
# Where the beginning of a prompt came from: a slot, memory or disk of the state store, a cache file.
Source = Literal["none", "slot", "memory", "disk", "file"]


class ModelInfo(Struct, frozen=True):
    """`n_ctx`: the most tokens of a sequence. `can_cut`: a state can be shortened to any prefix of its
    tokens. `engine` and `settings`: everything that a saved state depends on besides the weights.
    `pool_tokens`: the most tokens that sequences in the pool hold together; 0: there is no pool.
    `step_tokens`: the most prompt tokens, of several sequences, that can be evaluated at once.

    A state of n tokens takes at most `state_bytes` + n * `state_token_bytes` bytes; 0 for both: unknown.

    `generates`: false for a model that only makes embeddings. An embedding has `embedding_size` numbers; 0:
    the model makes none. `embedding_tokens`: the most tokens of an input.

    For an engine whose runtime does more by itself: `takes_text`: it needs prompts as text, too.
    `state_files`: each state is a sidecar file that only the runtime writes and reads. `counts_reuse`: it
    counts the evaluated tokens; else nobody knows whether a state was used. `lacks`: unsupported parameters
    of requests. `sampling`: the parameters in force for all requests; None: each request has its own."""

    n_ctx: int
    slots: int
    can_cut: bool
    engine: str
    settings: dict[str, str]
    pool_tokens: int = 0
    step_tokens: int = 64
    state_bytes: int = 0
    state_token_bytes: int = 0
    generates: bool = True
    embedding_size: int = 0
    embedding_tokens: int = 0
    takes_text: bool = False
    state_files: bool = False
    counts_reuse: bool = True
    lacks: list[str] = []
    sampling: Sampling | None = None


class Ready(Struct, frozen=True, tag=True):
    """`tuning`: the received or measured one; None if the worker runs with defaults."""

    info: ModelInfo
    tuning: Tuning | None = None


class LoadFailed(Struct, frozen=True, tag=True):
    """`out_of_memory`: the model needs more memory than is available."""

    message: str
    out_of_memory: bool = False


class Stats(Struct, frozen=True):
    """Counted by the engine, times in milliseconds. cached + evaluated = prompt tokens; `ttft_ms` is from
    arrival in the worker to the first sampled token (or the computed state). `saved_bytes` and
    `saved_blake3`: size and hash of a saved state, hashed before it was written."""

    prompt_tokens: int
    cached_tokens: int
    evaluated_tokens: int
    generated_tokens: int
    source: Source
    restored_bytes: int
    saved_bytes: int
    queue_ms: float
    restore_ms: float
    prefill_ms: float
    decode_ms: float
    ttft_ms: float
    saved_blake3: str = ""


class Progress(Struct, frozen=True, tag=True):
    """Prefill has reached `computed` of `total` prompt tokens, `ms` milliseconds after it began. The first
    `cached` of them were not evaluated."""

    id: int
    computed: int
    total: int
    cached: int = 0
    ms: float = 0.0


class Token(Struct, frozen=True, tag=True):
    """A generated token. `logprob` and `top`, if requested: the natural logarithms of its probability and of
    those of the likeliest tokens, by the model alone, before penalties, temperature and other sampling."""

    id: int
    token: int
    logprob: float | None = None
    top: list[tuple[int, float]] = []


class Finished(Struct, frozen=True, tag=True):
    id: int
    reason: SequenceEnd
    stats: Stats


class Vector(Struct, frozen=True, tag=True):
    """The embedding of the next input, of length 1: `values` are float32, little-endian."""

    id: int
    values: bytes


class Embedded(Struct, frozen=True, tag=True):
    """All inputs have their vectors, or the request was cancelled."""

    id: int


class Forgotten(Struct, frozen=True, tag=True):
    """The states have been removed: `n_blocks` blocks."""

    id: int
    n_blocks: int


FailureKind = Literal["engine", "grammar", "memory", "storage", "storage_full", "died"]


class Failed(Struct, frozen=True, tag=True):
    """`kind` "grammar": the answer's grammar can't be followed. "died" is reported by the client on behalf of
    a worker that has ended."""

    id: int
    kind: FailureKind
    message: str


RequestEvent = Progress | Token | Finished | Vector | Embedded | Failed | Forgotten


class Step(Struct, frozen=True, tag=True):
    """All events of one engine step, in order: one message per step, however many tokens it has."""

    events: list[RequestEvent]


class StoreReport(Struct, frozen=True, tag=True):
    """The state store's present content, and its counts since the worker's start; sent when it has changed,
    at most once a second. `chains`: the number of blocks that none continues. `parked` and `park_ms`: the
    copies made out of slots, and the time that they took. `given_up`: states not kept because copying them
    would have made running requests wait. `verify_failures`: damaged blocks found. `write_failures`: blocks
    that the disk refused."""

    memory_bytes: int = 0
    memory_tokens: int = 0
    disk_bytes: int = 0
    disk_tokens: int = 0
    chains: int = 0
    evictions: int = 0
    parked: int = 0
    park_ms: float = 0.0
    given_up: int = 0
    verify_failures: int = 0
    write_failures: int = 0


WorkerMessage = Ready | LoadFailed | Step | StoreReport
