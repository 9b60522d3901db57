"""Answers of /v1/cache and /v1/verify."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, RootModel

from headstart.api.fields.reply import Answer, Reply
from headstart.caches.entry import Form, MissReason, Origin
from headstart.service.caching.verify import VerdictAction, VerdictState

Time = Field(description="ISO 8601, in UTC.")


class CacheForm(Reply):
    tokens: int
    size_mb: float = Field(description="Millions of bytes.")


class CacheMade(Reply):
    object: Literal["cache.created", "cache.updated"]
    cache_name: str
    model: str
    version: int
    size_mb: float
    ttft_ms: float = Field(
        description="Time to compute the first form: how long a chat without the cache would wait."
    )
    build_ms: float
    tokens: int
    forms: dict[Form, CacheForm]
    expires: str | None = Time
    message: str
    warning: str | None = Field(None, description="Only for a prompt under 100 tokens.")


class Cache(Reply):
    object: Literal["cache"]
    cache_name: str
    model: str
    origin: Origin
    owner: str | None
    version: int
    size_mb: float
    tokens: int
    forms: dict[Form, CacheForm]
    evicted: list[Form]
    created: str = Time
    updated: str = Time
    ttl_seconds: float | None
    expires: str | None = Time
    pinned: bool
    description: str | None
    metadata: dict[str, str]
    build_ms: float
    unverified: bool = Field(
        description="True: the cache file can't be read; these fields come from the copy of its header."
    )
    hits: int | None = Field(
        description="Null for a public cache unless the key is an admin's; so are the next three."
    )
    last_used: str | None = Time
    tokens_saved: int | None
    seconds_saved: float | None


class CacheDetails(Cache):
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    parts: list[str] | None = Field(None, description="The caches that a derived cache combines.")
    would_hit: bool | None = Field(
        description="Whether a request would start from the cache's state now; null while the model loads."
    )
    miss_reason: MissReason | None


class Building(Reply):
    cache_name: str
    model: str


class StoreTier(Reply):
    bytes: int
    tokens: int
    limit_bytes: int = Field(description="The most that it may take now; 0: the tier is off.")


class StoreHits(Reply):
    """Requests that started from a state, by where it lay."""

    slot: int
    memory: int
    disk: int
    file: int


class StateStore(Reply):
    """The states of earlier requests, kept without a name. Counts are since the server's start."""

    memory: StoreTier
    disk: StoreTier
    chains: int = Field(description="Number of prompts that no other continues.")
    evictions: int
    hits: StoreHits
    parked: int = Field(description="Number of copies out of slots.")
    park_ms: float = Field(description="Milliseconds that these copies took.")
    given_up: int = Field(description="States not kept because copying would have held up running requests.")
    verify_failures: int = Field(description="Damaged blocks found.")
    write_failures: int = Field(description="Blocks that the disk refused.")


class CacheList(Reply):
    object: Literal["list"]
    data: list[Cache]
    building: list[Building]
    store: StateStore | None = Field(description="Null unless the key is an admin's.")


class AllCaches(CacheList):
    used_bytes: int
    quota_bytes: int | None
    evictions: int
    responses: int = Field(description="Number of stored responses, which are not listed.")


class CacheDeleted(Reply):
    object: Literal["cache.deleted"]
    cache_name: str
    model: str
    deleted: Literal[True]


class StatesCleared(Reply):
    object: Literal["cache.cleared"]
    model: str | None = Field(description="Null: all models.")
    cleared: Literal[True]


class Verdict(Reply):
    cache_name: str
    model: str
    owner: str | None
    state: VerdictState
    would_hit: bool | None
    miss_reason: MissReason | None
    detail: str
    action: VerdictAction | None


class CacheProgress(Reply):
    object: Literal["cache.progress"]
    computed: int
    total: int


class CacheEvent(RootModel[CacheProgress | CacheMade]):
    """Progress; the last event is the answer."""


class CacheVerdict(Verdict):
    object: Literal["cache.verdict"]


class Summary(Reply):
    object: Literal["cache.verification"]
    checked: int
    ok: int
    damaged: int
    unfit: int
    stray: int
    repaired: int
    wrong: int


class Verification(Summary):
    data: list[Verdict]


class VerificationEvent(RootModel[CacheVerdict | Summary]):
    """A verdict for each cache; the last event has the totals."""


# Keyed by method and path.
ANSWERS = {
    ("get", "/v1/cache"): Answer(AllCaches),
    ("delete", "/v1/cache"): Answer(StatesCleared),
    ("post", "/v1/cache/{model}"): Answer(CacheMade, CacheEvent),
    ("get", "/v1/cache/{model}"): Answer(CacheList),
    ("get", "/v1/cache/{model}/{name}"): Answer(CacheDetails),
    ("patch", "/v1/cache/{model}/{name}"): Answer(Cache),
    ("delete", "/v1/cache/{model}/{name}"): Answer(CacheDeleted),
    ("get", "/v1/cache/{model}/{name}/file"): Answer(None),
    ("put", "/v1/cache/{model}/{name}/file"): Answer(CacheMade),
    ("post", "/v1/verify"): Answer(Verification, VerificationEvent),
}
