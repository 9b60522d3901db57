"""The messages between the server and a model's worker process: one page, all frozen.

The engine handles token ids and paths; text crosses only for an engine whose runtime requires it. A request
is one `Submit`, answered by any number of `Progress` and `Token` events and exactly one terminal event,
`Finished` or `Failed`, also after `Cancel`; or one `Embed`, answered by `Vector` events and `Embedded` or
`Failed`.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from headstart.numerics import Numerics, Tuning

SequenceEnd = Literal["stop", "length", "saved", "cancelled"]
Source = Literal["none", "slot", "file"]


class Sampling(Struct, frozen=True):
    """Sampling parameters of one request; `temperature` 0 is greedy. Penalties look back over the last
    `repeat_last_n` tokens, the prompt's included, as in llama.cpp. `seed` None: a random one each time.

    `logit_bias`: values added to the logits of tokens. `ignore_eos`: tokens that end an answer are not
    chosen. `logprobs`: the number of likeliest tokens reported with each token; None: not even the token's
    own probability. `grammar`: an llguidance grammar that the answer must match; "": none."""

    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 40
    min_p: float = 0.05
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int | None = None
    logit_bias: dict[int, float] = {}
    ignore_eos: bool = False
    logprobs: int | None = None
    grammar: str = ""


class RkllmSettings(Struct, frozen=True):
    """Settings of the NPU runtime. `library` and `abi` "", `cpus` and `cpu_mask` 0, `log_level` None:
    detected, or chosen by the machine. `sampling`: for all requests, if the runtime doesn't accept it per
    request."""

    library: str = ""
    abi: str = ""
    cpus: int = 0
    cpu_mask: int = 0
    embed_flash: bool = True
    log_level: int | None = None
    sampling: Sampling = Sampling()


class EngineSettings(Struct, frozen=True):
    """How a worker runs its model. For `slots` and `ctx` (tokens per slot) 0 means: chosen by the model and
    the machine. `share_from`: the number of common tokens from which sequences run in the pool; 0: never.

    For `threads` and `prefill_chunk` 0, for the others None means: chosen by `tuning`. If there is none, the
    worker measures if `tune` is set; else, or if measuring fails, it uses defaults. `conversions`: the
    directory of converted weights and the common prefix of this model's file names; "": there can be none.
    `within_memory`: loading fails rather than take more memory than is available.

    For a measurement: `tried`: the doubtful results of earlier ones. `existing`: the numerics of existing
    caches, which are chosen unless others save a tenth of a hit."""

    path: str
    slots: int
    ctx: int
    threads: int = 0
    prefill_chunk: int = 0
    numerics: Numerics = Numerics()
    max_step_ms: float = 300
    share_from: int | None = None
    tune: bool = False
    tuning: Tuning | None = None
    conversions: str = ""
    within_memory: bool = False
    tried: Tuning | None = None
    existing: Numerics = Numerics()
    rkllm: RkllmSettings = RkllmSettings()


class StateRef(Struct, frozen=True):
    """The place of a verified state: `nbytes` at `offset` of the file at `path`, computed from `n_tokens`
    tokens. `identity` is that of the verified file: (device, inode, size, mtime in ns); the engine refuses a
    file with another."""

    path: str
    offset: int
    nbytes: int
    n_tokens: int
    identity: tuple[int, int, int, int]


class SaveTo(Struct, frozen=True):
    """The place to write a state to: `offset` of the file at `path`, which must exist."""

    path: str
    offset: int = 0


# To the worker


class Begin(Struct, frozen=True, tag=True):
    """The first message, sent once: a worker is started before it is known whether and how to load the
    model."""

    settings: EngineSettings


class Submit(Struct, frozen=True, tag=True):
    """One sequence: prefill `tokens`, then generate up to `max_tokens`, or save the state.

    `n`: the number of answers, at most the number of slots. Each is as if it were a request of its own; their
    ids count up from `id`, their seeds from `seed`. The prompt is prefilled once for all of them; until then,
    cancelling one cancels all.

    `boundary`: the position where prefill is cut, so that the values don't depend on whether the first
    `boundary` tokens were computed or restored; 0 for none, below the number of tokens unless nothing is
    generated. At most `boundary` tokens of the state in `restore` are used. `shared`: `restore` is the state
    of another prefix, which has that many tokens in common with this one; it is used up to a place where both
    are cut, if the model can cut states at all. None: it is this prefix's own state. `reuse=False`: every
    token is evaluated. A saved state was prefilled, whatever was decoded before.

    `owner`: the owner of the request. The state of another owner is shared for the first `public` tokens
    only, since everybody may know that these were computed.

    `text`: the text of `tokens`, if the engine needs it (`ModelInfo.takes_text`). `progress`: report prefill
    from its start on, if the engine sees it; for `save_to` chunks are reported in any case.
    """

    id: int
    tokens: list[int]
    boundary: int = 0
    max_tokens: int = 0
    sampling: Sampling = Sampling()
    restore: StateRef | None = None
    shared: int | None = None
    save_to: SaveTo | None = None
    reuse: bool = True
    owner: str = ""
    public: int = 0
    n: int = 1
    text: str = ""
    progress: bool = False


class Embed(Struct, frozen=True, tag=True):
    """Requests the embedding of each input; an input has from 1 to `embedding_tokens` tokens."""

    id: int
    inputs: list[list[int]]


class Cancel(Struct, frozen=True, tag=True):
    id: int


Command = Begin | Submit | Embed | Cancel


# From the worker


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


FailureKind = Literal["engine", "grammar", "memory", "storage", "storage_full", "died"]


class Failed(Struct, frozen=True, tag=True):
    """`kind` "grammar": the answer's grammar can't be followed. "died" is reported by the client on behalf of
    a worker that has ended."""

    id: int
    kind: FailureKind
    message: str


RequestEvent = Progress | Token | Finished | Vector | Embedded | Failed


class Step(Struct, frozen=True, tag=True):
    """All events of one engine step, in order: one message per step, however many tokens it has."""

    events: list[RequestEvent]


WorkerMessage = Ready | LoadFailed | Step
