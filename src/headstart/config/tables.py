"""Tables of the configuration file with fields of their own: declared caches, sampling, API keys."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from headstart.contents import Description, Ttl, Utf8
from headstart.errors import StartupError
from headstart.names import NAME
from headstart.regular_files import read_text as read_file


class Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class DeclaredCache(Table):
    """`[caches.NAME]`: a declared cache. `model` None: the first one."""

    prompt: Utf8 = ""
    file: Path | None = None
    model: str | None = None
    forms: list[Literal["chat", "completion"]] = Field(["chat", "completion"], alias="for", min_length=1)
    ttl_seconds: Ttl | None = None
    pinned: bool = False
    description: Description = ""

    @model_validator(mode="after")
    def _check_text(self) -> DeclaredCache:
        if bool(self.prompt) == (self.file is not None):
            raise ValueError("needs exactly one of prompt and file")
        return self

    def text(self, name: str, folder: Path) -> str:
        """The prompt; a file's path starts at `folder`. Raises StartupError, which names the cache."""
        if self.file is None:
            return self.prompt
        text = read_text(folder / self.file.expanduser(), f"The text of the cache {name!r}")
        if not text:
            raise StartupError(f"The text of the cache {name!r}, {folder / self.file}, is empty.")
        return text


class FixedSampling(Table):
    """`[rkllm_sampling]`, with the field names of requests."""

    temperature: float = Field(0.8, ge=0, le=2)
    top_p: float = Field(0.95, ge=0, le=1)
    top_k: int = Field(40, ge=-1, lt=1 << 31)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repeat_penalty: float = Field(1.0, gt=0, le=10)


class ApiKey(Table):
    """`[keys.NAME]`: a client's credential. `key_env`: the name of an environment variable. `cache`: the
    cache for requests that name none. `quota_mb`: maximum size of its caches in millions of bytes. `admin`:
    whether the key may manage objects that are public or other keys'; None: only if it is the only key."""

    key: SecretStr | None = None
    key_file: Path | None = None
    key_env: str | None = None
    cache: str | None = None
    quota_mb: float | None = Field(None, ge=0)
    admin: bool | None = None

    @model_validator(mode="after")
    def _check_fields(self) -> ApiKey:
        if sum(source is not None for source in (self.key, self.key_file, self.key_env)) != 1:
            raise ValueError("give one of key, key_file and key_env")
        if self.cache is not None:
            check_names([self.cache])
        return self

    def secret(self, name: str, folder: Path) -> str:
        """The key itself; a file's path starts at `folder`. Raises StartupError, which names it."""
        if self.key_file is not None:
            secret = read_text(folder / self.key_file.expanduser(), f"The API key {name!r}").strip()
        elif self.key_env is not None:
            secret = os.environ.get(self.key_env, "")
        else:
            secret = self.key.get_secret_value() if self.key else ""
        if not (secret and secret.isascii() and secret.isprintable() and " " not in secret):
            raise StartupError(f"The API key {name!r} is empty or not of visible ASCII characters.")
        return secret


def check_names(names: Iterable[str]) -> None:
    """Raises ValueError for a name that no cache, model or key can have."""
    for name in names:
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not a name: letters, digits, dots, underscores, hyphens")


# Paths that would be taken for those of the server's state, which monitoring asks for.
STATE_PATHS = ("/health", "/ready", "/metrics")


def check_route(prefix: str) -> None:
    """Raises ValueError for a prefix that can't precede the paths of the API."""
    bad = not prefix.startswith("/") or prefix.endswith("/") or "//" in prefix or not prefix.isprintable()
    if bad or prefix.partition("/v1")[0] == "" or prefix in STATE_PATHS:
        raise ValueError(
            f"{prefix!r} is not a route prefix: a path outside the API, such as /coding, without / at its end"
        )


def read_text(path: Path, what: str) -> str:
    """Raises StartupError about `what`."""
    try:
        return read_file(path, follow=True)
    except OSError as error:
        raise StartupError(f"{what} can't be read from {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise StartupError(f"{what} is not UTF-8 text, in {path}: {error}") from error
