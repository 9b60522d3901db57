"""What crosses the socket between the server and a model's worker process: one page, all frozen.

The engine speaks token ids and paths; text crosses only for one whose runtime takes nothing else. A request
is one `Submit`, answered by any number of `Progress` and `Token` events and exactly one terminal event,
`Finished` or `Failed`, also after `Cancel`; or one `Embed`, answered by `Vector` events and `Embedded` or
`Failed`.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from headstart.numerics import Numerics, Tuning

FinishReason = Literal["stop", "length", "saved", "cancelled"]
Source = Literal["none", "slot", "file"]


class Sampling(Struct, frozen=True):
    """Sampling parameters of one request; `temperature` 0 is greedy. Penalties look back over the last
    `repeat_last_n` tokens, the prompt's included, as in llama.cpp. `seed` None: a fresh one each time.

    `logit_bias`: what is added to the logits of tokens. `ignore_eos`: no token that ends an answer is chosen.
    `logprobs`: how many of the likeliest tokens are told with each token; None: not even its own probability.
    `grammar`: what the answer must match, as llguidance writes it; "" for anything."""

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
    """What only the NPU's runtime knows. `library` and `abi` "", `cpus` and `cpu_mask` 0, `log_level` None:
    found out, or by the machine. `sampling`: for all requests, where the runtime can't have it for each."""

    library: str = ""
    abi: str = ""
    cpus: int = 0
    cpu_mask: int = 0
    embed_flash: bool = True
    log_level: int | None = None
    sampling: Sampling = Sampling()


class EngineSettings(Struct, frozen=True):
    """How a worker runs its model. For `slots` and `ctx` (tokens a slot) 0 means: by the model and the
    machine. `share_from`: how many tokens sequences must have in common to be run in the pool; 0: never.

    For `threads` and `prefill_chunk` 0, for the others None means: by `tuning`. Where there is none, the
    worker measures if `tune` says so; else, or if measuring fails, it takes defaults. `conversions`: the
    directory of converted weights and how the names of this model's begin; "": there can be none.
    `within_memory`: loading fails rather than take more memory than is available.

    Of a measurement: `tried`: what earlier ones found that can't be relied on. `kept`: the arithmetic that
    caches have, which is chosen unless another saves a tenth of a hit."""

    path: str
    slots: int
    ctx: int
    threads: int = 0
    prefill_chunk: int = 0
    arithmetic: Numerics = Numerics()
    max_step_ms: float = 300
    share_from: int | None = None
    tune: bool = False
    tuning: Tuning | None = None
    conversions: str = ""
    within_memory: bool = False
    tried: Tuning | None = None
    kept: Numerics = Numerics()
    rkllm: RkllmSettings = RkllmSettings()


class StateRef(Struct, frozen=True):
    """Where a verified state lies: `nbytes` at `offset` of the file at `path`, computed from `n_tokens`
    tokens. `identity` is what was verified: (device, inode, size, mtime in
    ns); the engine refuses a file that has another."""

    path: str
    offset: int
    nbytes: int
    n_tokens: int
    identity: tuple[int, int, int, int]


class SaveTo(Struct, frozen=True):
    """Where a state is to be written: at `offset` of the file at `path`, which must exist."""

    path: str
    offset: int = 0


# To the worker


class Begin(Struct, frozen=True, tag=True):
    """Comes first, and once: a worker is started before it is known whether and how the model is to be
    loaded."""

    settings: EngineSettings


class Submit(Struct, frozen=True, tag=True):
    """One sequence: prefill `tokens`, then generate up to `max_tokens`, or save the state.

    `n`: so many answers, no more than there are slots, each as if it were a request of its own with the ids
    from `id` on and, of seeds, with the numbers from `seed` on. The prompt is prefilled once for all of them;
    until that is done cancelling one cancels all.

    `boundary`: where prefill is cut so that the values don't depend on whether the first `boundary` tokens
    were computed or restored; 0 for none, below the number of tokens unless nothing is generated. Of a state
    in `restore` no more than `boundary` tokens are used. `shared`: `restore` is the state of another opening,
    which has so many tokens in common with this one; it is used up to a place where both are cut, if the
    model can cut states at all. None: it is this opening's own. `reuse=False`: every token is evaluated. What
    is saved was prefilled, whatever was decoded before.

    `owner`: for whom it is. What was computed for another is shared for the first `public` tokens only, which
    everybody may know to have been computed.

    `text`: what `tokens` were made from, where `ModelInfo.takes_text` says that the engine needs it.
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


class Embed(Struct, frozen=True, tag=True):
    """The embeddings of some inputs, each of at least one token and no more than `embedding_tokens`."""

    id: int
    inputs: list[list[int]]


class Cancel(Struct, frozen=True, tag=True):
    id: int


Command = Begin | Submit | Embed | Cancel


# From the worker


class ModelInfo(Struct, frozen=True):
    """`n_ctx`: tokens a sequence may hold. `can_cut`: a state may be shortened to any prefix of its tokens.
    `engine` and `settings` name what a saved state depends on besides the weights. `pool_tokens`: how many
    tokens sequences with a common prefix may hold together; 0: there is no pool. `step_tokens`: prompt tokens
    that can be evaluated at once, of several sequences.

    A state of n tokens takes at most `state_bytes` + n * `state_token_bytes` bytes; 0 for both: that isn't
    known.

    `generates`: false for a model that only makes embeddings. These have `embedding_size` numbers; 0: there
    are none. `embedding_tokens`: how many tokens may be embedded as one.

    Of an engine whose runtime does more by itself: `takes_text`: prompts are given to it as text, too.
    `state_files`: each state is a file that the runtime writes and reads alone. `counts_reuse`: it says what
    it evaluated; else nobody can tell whether a state was used. `lacks`: parameters of requests that it
    doesn't have. `sampling`: the same for all requests; None: each has its own."""

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
    """`tuning`: what the worker was told or has measured; None where it runs with defaults."""

    info: ModelInfo
    tuning: Tuning | None = None


class LoadFailed(Struct, frozen=True, tag=True):
    """`out_of_memory`: it would have taken more than is available."""

    message: str
    out_of_memory: bool = False


class Stats(Struct, frozen=True):
    """Counted by the engine, times in milliseconds. cached + evaluated = prompt tokens; `ttft_ms` is from
    arrival in the worker to the first sampled token (or the computed state). Of a saved state: its size, and
    its hash, taken before it was written."""

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
    """Prefill has reached `computed` of `total` prompt tokens."""

    id: int
    computed: int
    total: int


class Token(Struct, frozen=True, tag=True):
    """With the natural logarithms of its probability and of the likeliest tokens', where they were asked for;
    they are the model's own, before penalties, temperature and whatever else chose it."""

    id: int
    token: int
    logprob: float | None = None
    top: list[tuple[int, float]] = []


class Finished(Struct, frozen=True, tag=True):
    id: int
    reason: FinishReason
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
    """`kind` "grammar": the one for the answer can't be followed. "died" is what the client says for a worker
    that can't say anything any more."""

    id: int
    kind: FailureKind
    message: str


RequestEvent = Progress | Token | Finished | Vector | Embedded | Failed


class Step(Struct, frozen=True, tag=True):
    """All events of one engine step, in order: one message a step, however many tokens it made."""

    events: list[RequestEvent]


WorkerMessage = Ready | LoadFailed | Step
