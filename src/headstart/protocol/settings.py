"""How a worker runs its model."""

from __future__ import annotations

from msgspec import Struct

from headstart.numerics import Numerics, Tuning


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


class StateSettings(Struct, frozen=True):
    """The state store: what sequences have computed is kept there. `directory`: the place of this model's
    blocks; "": there is none. `weights`: what identifies the model's weights. `memory_bytes` and
    `disk_bytes`: the most bytes of each tier; 0: the tier is off. `days`: blocks unused for longer are
    removed; 0: never."""

    directory: str = ""
    weights: str = ""
    memory_bytes: int = 0
    disk_bytes: int = 0
    days: float = 7


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
    states: StateSettings = StateSettings()
