"""The settings: one frozen object, from flags, environment (HEADSTART_…), a TOML file and defaults, in this
order of precedence."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from headstart.config.tables import ApiKey, DeclaredCache, FixedSampling, check_names, check_route
from headstart.contents import Utf8
from headstart.errors import StartupError
from headstart.model_files import embedded_model, models_in
from headstart.numerics import Weights

LogFormat = Literal["text", "json"]
DEFAULT_MODEL = "smollm2"


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="HEADSTART_", frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8080, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    models: dict[str, str] = Field(
        default_factory=dict,
        description="Model names and their GGUF or .rkllm files; empty: the embedded smollm2.",
    )
    models_dir: Path | None = Field(None, description="A folder whose *.gguf files are models too.")
    preload: Literal["first", "all", "none"] = Field(
        "first",
        description="Models loaded at the start: the first, all or none; others: at first use.",
    )
    load_timeout: float = Field(
        120, gt=0, description="Seconds that a request waits for its model to load; then 503."
    )
    max_loaded: int = Field(
        0, ge=0, description="Maximum number of loaded models; 0: as many as fit in memory."
    )
    idle_unload_seconds: float = Field(
        0,
        ge=0,
        description="Seconds without requests until a model is unloaded; 0: only if memory is short.",
    )
    aliases: dict[str, str] = Field(
        default_factory=dict,
        description="Other names of models: each names a model or a `model@cache`.",
    )
    templates: dict[str, Path] = Field(
        default_factory=dict, description="Jinja files with chat templates to use instead of the models' own."
    )
    cache_dir: Path = Field(Path("cache"), description="The cache directory.")
    quota_mb: float = Field(
        0, ge=0, description="Maximum size of all caches in millions of bytes; 0: no limit."
    )
    state_memory_mb: float | None = Field(
        None,
        ge=0,
        description="Memory for states computed earlier, of all models, in millions of bytes; 0: none; "
        "unset: an eighth of the memory, at most 8000; a sixteenth where there is 4 GiB or less.",
    )
    state_disk_mb: float | None = Field(
        None,
        ge=0,
        description="Disk space for them, in millions of bytes; 0: none; unset: a tenth of what is free, at "
        "most 20000; a twentieth where less than 8000 is free.",
    )
    state_days: float = Field(
        7, ge=0, description="Days without use after which such a state is deleted; 0: never."
    )
    slots: int = Field(
        0,
        ge=0,
        le=64,
        description="Sequences that a model runs at once; 0: 4, or as many as an eighth of the memory holds.",
    )
    ctx: int = Field(
        0, ge=0, description="Context length of a sequence in tokens; 0: the model's limit, at most 8192."
    )
    tune: bool = Field(
        True,
        description="Measure the fastest settings once per model and machine; false: use built-in defaults.",
    )
    tune_idle_seconds: float = Field(
        10,
        ge=0,
        allow_inf_nan=False,
        description="Seconds without requests after which doubtful measurements are repeated; 0: never.",
    )
    threads: int = Field(0, ge=0, description="Number of threads of a model; 0: as measured.")
    prefill_chunk: int = Field(
        0, ge=0, le=4096, description="Maximum prompt tokens evaluated in one step; 0: as measured."
    )
    flash_attention: bool | None = Field(
        None,
        description="llama.cpp's flash attention; unset: as in existing caches, or measured.",
    )
    weights: Weights | None = Field(
        None,
        description="As in the model file, or converted to q8_0; unset: as in existing caches, or measured.",
    )
    share_from: int | None = Field(
        None,
        ge=0,
        description="Common tokens from which running requests share a prefix; 0: never; unset: as measured.",
    )
    max_step_ms: float = Field(
        300, gt=0, description="Maximum milliseconds of prefill in one step while other streams run."
    )
    rkllm_library: str = Field("", description="Path of librkllmrt.so; empty: the system's library path.")
    rkllm_abi: str = Field("", description="Release of the runtime if it can't be detected: 1.2.0 to 1.3.0.")
    rkllm_cpus: int = Field(
        0,
        ge=0,
        description="Number of CPUs that the runtime uses beside the NPU; 0: the fast ones, at most 4.",
    )
    rkllm_cpu_mask: int = Field(
        0, ge=0, lt=1 << 32, description="Bit mask of these CPUs; 0: the last ones; 240 on an RK3588."
    )
    rkllm_embed_flash: bool = Field(
        True, description="Read embeddings from the model file when needed instead of keeping them in memory."
    )
    rkllm_log_level: int | None = Field(
        None, ge=0, le=2, description="Log level of the runtime; unset: the variable RKLLM_LOG_LEVEL."
    )
    rkllm_sampling: FixedSampling = Field(
        default_factory=FixedSampling,
        description="Sampling parameters for runtimes that have no parameters per request (before 1.3.0).",
    )
    rkllm_other_sampling: Literal["warn", "refuse"] = Field(
        "warn", description="Requests with other sampling parameters: get a warning in the answer, or 400."
    )
    prompt_timeout: float = Field(
        30, gt=0, description="Maximum seconds for the tokenisation of a prompt; then 503."
    )
    max_waiting: int = Field(
        64,
        ge=0,
        description="Maximum requests that wait for a slot, and for the check of a grammar; more get 503.",
    )
    max_body_mb: float = Field(
        16, gt=0, description="Maximum size of a request body in MiB; larger ones get 413."
    )
    max_bodies_mb: float = Field(
        64,
        gt=0,
        description="Maximum MiB of the bodies of all requests in progress; more get 503. Each of "
        "several API keys may have half.",
    )
    max_connections: int = Field(
        1000, ge=1, description="Maximum connections; beyond it, the longest idle one is closed."
    )
    head_seconds: float = Field(10, gt=0, description="Maximum seconds to receive the headers.")
    body_seconds: float = Field(
        30, gt=0, description="Maximum seconds that a client may lag behind 16 KiB/s in sending a body."
    )
    send_seconds: float = Field(
        60, gt=0, description="Maximum seconds that a client may lag behind 16 KiB/s when it reads an answer."
    )
    keep_alive_seconds: float = Field(
        15, gt=0, description="Seconds that an idle connection stays open between requests."
    )
    drain_seconds: int = Field(30, ge=0, description="Seconds for running requests to finish at a stop.")
    log_level: str = Field(
        "warning", description="debug, info, warning or error; from info on, one line for each request."
    )
    log_format: LogFormat = Field("text", description="Lines to read, or a JSON object a line.")
    tracing: bool = Field(False, description="Send OpenTelemetry spans as the variables OTEL_* say.")
    caches: dict[str, DeclaredCache] = Field(
        default_factory=dict, description="Declared caches, built by the server."
    )
    prune_declared: bool = Field(False, description="Delete caches at the start that are no longer declared.")
    default_system: Utf8 | None = Field(
        None, min_length=1, description="System message for chats without one that name no cache."
    )
    automatic: bool = Field(True, description="Create caches of frequent system prompts.")
    automatic_after: int = Field(
        3, ge=1, description="Number of uses after which a system prompt becomes an automatic cache."
    )
    automatic_window: float = Field(3600, gt=0, description="Seconds within which these uses are counted.")
    automatic_tokens: int = Field(
        100, ge=0, description="Number of tokens that an automatic cache must exceed."
    )
    automatic_quota_mb: float = Field(
        512,
        ge=0,
        description="Maximum size of all automatic caches; the least recently used are deleted first.",
    )
    responses_ttl_seconds: float = Field(
        86400, gt=0, le=3155760000, description="Seconds that a stored response is kept."
    )
    responses_quota_mb: float = Field(
        1024,
        ge=0,
        description="Maximum size of stored responses' states; the oldest are evicted first; 0: texts only.",
    )
    responses_kept: int = Field(
        1000, ge=1, description="Maximum stored responses of each API key; the oldest are deleted first."
    )
    routes: dict[str, str] = Field(
        default_factory=dict, description="Path prefixes before /v1, each with the cache that it selects."
    )
    keys: dict[str, ApiKey] = Field(
        default_factory=dict,
        description="API keys, each with its own caches; if there are any, requests need one.",
    )
    metrics_public: bool = Field(
        False, description="Answer /metrics without an API key; else it needs an admin's if there are keys."
    )
    allow_public: bool = Field(False, description="Allow addresses other than loopback without API keys.")

    # The directory of the configuration file, which relative paths in tables start from.
    folder: ClassVar[Path] = Path()

    @field_validator("models", "aliases", "caches", "keys")
    @classmethod
    def _check_names(cls, table: dict[str, Any]) -> dict[str, Any]:
        check_names(table)
        return table

    @field_validator("routes")
    @classmethod
    def _check_routes(cls, table: dict[str, str]) -> dict[str, str]:
        for prefix in table:
            check_route(prefix)
        check_names(table.values())
        return table

    @model_validator(mode="after")
    def _check_models(self) -> Settings:
        models = self.models or {DEFAULT_MODEL}
        meant = [target.partition("@") for target in self.aliases.values()]
        check_names(cache for _, at, cache in meant if at)
        for name in (*(model for model, _, _ in meant), *self.templates):
            if name not in models and self.models_dir is None:
                raise ValueError(f"{name!r} has an alias or a template, but is not a model")
        for name, cache in self.caches.items():
            if cache.model not in (None, *models) and self.models_dir is None:
                raise ValueError(f"the cache {name!r} is for {cache.model!r}, which is not a model")
        return self

    @property
    def model_paths(self) -> dict[str, str]:
        """Models configured by name, then those in the folder; the embedded one if neither is configured."""
        if not (self.models or self.models_dir):
            return {DEFAULT_MODEL: embedded_model()}
        found = models_in(self.models_dir) if self.models_dir else {}
        return self.models | {name: path for name, path in found.items() if name not in self.models}

    @property
    def quotas(self) -> dict[str, int]:
        """Byte limits for the caches of API keys, by the key's name; other keys have no limit."""
        return {name: int(key.quota_mb * 1e6) for name, key in self.keys.items() if key.quota_mb is not None}

    @property
    def admins(self) -> set[str]:
        """Names of the API keys that are admins."""
        alone = len(self.keys) == 1
        return {name for name, key in self.keys.items() if (alone if key.admin is None else key.admin)}

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings, env_settings, TomlConfigSettingsSource(settings_cls))


def load_settings(config: Path | None = None, **flags: Any) -> Settings:
    """`flags` that are None or empty are not set. Raises StartupError that names each wrong setting."""
    if config is not None and not config.is_file():
        raise StartupError(f"There is no configuration file {config}.")

    class FromFile(Settings):
        model_config = SettingsConfigDict(toml_file=config)
        folder: ClassVar[Path] = config.parent if config else Path()

    try:
        return FromFile(**{name: value for name, value in flags.items() if value not in (None, {})})
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in error.errors())
        raise StartupError("Wrong settings: " + "; ".join(problems)) from error
    except (ValueError, RecursionError) as error:
        raise StartupError(f"{config} is not valid TOML: {error}") from error
