"""Properties of a cache that don't require reading its states."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field
from msgspec.structs import replace

from headstart.caches.index.usage import Time
from headstart.names import NAME, CacheKey, Namespace

Form = Literal["chat", "completion"]
FORMS: tuple[Form, ...] = ("chat", "completion")
# How many caches a derived one may combine.
MAX_PARTS = 8
Identity = tuple[int, int, int, int]
# Valid values of fields in entries read from a file or another source (`entry_checks.py`).
CacheName = Annotated[str, Meta(pattern=rf"^{NAME.pattern}\Z")]
Milliseconds = Annotated[float, Meta(ge=0, le=1e15)]
Count = Annotated[int, Meta(ge=0, le=1 << 60)]
Word = Annotated[str, Meta(max_length=1000)]
# How a cache came to be. client: created by name; declared: in the configuration; automatic: its prompt was
# frequent or had a breakpoint; derived: a request named several caches together; conversation: a stored chat;
# response: a stored response, to continue from.
Origin = Literal["client", "declared", "automatic", "derived", "conversation", "response"]
# Why a named state was not used. After reasons in KEEPS_STATE, which concern the request itself, the state is
# kept; after the others it is rebuilt.
MissReason = Literal[
    "first_use",
    "evicted",
    "corrupt",
    "model_changed",
    "engine_changed",
    "settings_changed",
    "template_changed",
    "restore_failed",
    "too_short",
    "form_not_built",
    "prompt_differs",
    "cache_prompt_false",
    "not_counted",
]
KEEPS_STATE: frozenset[MissReason] = frozenset(
    {"too_short", "form_not_built", "prompt_differs", "cache_prompt_false", "not_counted"}
)

# The words for a setting whose name is unclear, and the value of one that is not given.
WORDS = {"weights": "the format of the weights"}
UNSET = {"weights": "file"}


class Fingerprint(Struct, frozen=True):
    """Everything that a state depends on. `weights` is the SHA-256 of the model file, `engine` the version
    that computed it, `settings` those engine settings that change its bytes, `template` a hash of the chat
    template."""

    weights: Word
    engine: Word
    settings: Annotated[dict[Word, Word], Meta(max_length=100)]
    template: Word

    def changed_since(self, other: Fingerprint) -> MissReason | None:
        """The miss reason of a state with the `other` fingerprint under this one; None if it is usable."""
        if self.weights != other.weights:
            return "model_changed"
        if self.engine != other.engine:
            return "engine_changed"
        if self.settings != other.settings:
            return "settings_changed"
        return None if self.template == other.template else "template_changed"

    def differences(self, other: Fingerprint) -> str:
        """The differences from the `other` fingerprint in words; "" for none."""
        found = []
        if self.weights != other.weights:
            found.append("the weights are others")
        if self.engine != other.engine:
            found.append(f"the engine is {self.engine}, was {other.engine}")
        for name in sorted(self.settings.keys() | other.settings.keys()):
            unset = UNSET.get(name, "unset")
            now, then = self.settings.get(name, unset), other.settings.get(name, unset)
            if now != then:
                found.append(f"{WORDS.get(name, name.replace('_', ' '))} is {now}, was {then}")
        if self.template != other.template:
            found.append("the chat template is another")
        return "; ".join(found)


class StoredForm(Struct, frozen=True):
    """The number of tokens of a form and the place of its state: an offset in bytes in the cache file or,
    with `in_sidecar`, a sidecar file."""

    n_tokens: Count
    state_offset: Count
    state_bytes: Count
    in_sidecar: bool = False


class Content(Struct, frozen=True):
    """The content of a cache: `prompt`, the system message in chats and the beginning of completions; or, for
    chats only, `messages` as templates take them and the `tools` offered in them."""

    prompt: str = ""
    messages: list[dict[str, Any]] = []
    tools: list[dict[str, Any]] = []

    @property
    def forms(self) -> tuple[Form, ...]:
        """The possible forms."""
        return FORMS if self.prompt else ("chat",)

    @property
    def prefix_messages(self) -> list[dict[str, Any]]:
        """The messages with which chats of this cache begin."""
        return [{"role": "system", "content": self.prompt}] if self.prompt else self.messages


class Retention(Struct, frozen=True):
    """How long and with which labels a cache is kept. It expires `ttl_seconds` after it was last written,
    unless that is None; a `pinned` one is never evicted. `description` and `metadata` are the user's own."""

    ttl_seconds: float | None = None
    pinned: bool = False
    description: str = ""
    metadata: dict[str, str] = {}


DEFAULT_RETENTION = Retention()


class Entry(Struct, frozen=True):
    """A cache. Times are seconds since 1970; `identity` is that of the file that was read or written.
    `evicted`: the forms whose states were evicted; they are rebuilt at their next use. `parts`: the caches
    that a derived one combines. `owner`: the API key it belongs to, "" for a public cache. `prefill_ms`: the
    time to compute each form, in whichever build; `build_ms` is of the last build alone."""

    model: Word
    name: Word
    prompt: str
    version: Annotated[int, Meta(ge=0, lt=1 << 53)]
    created: Time
    updated: Time
    fingerprint: Fingerprint
    forms: dict[Form, StoredForm]
    build_ms: Milliseconds
    ttft_ms: Milliseconds
    identity: Identity = (0, 0, 0, 0)
    messages: list[dict[str, Any]] = []
    tools: list[dict[str, Any]] = []
    retention: Retention = field(default=DEFAULT_RETENTION, name="terms")
    origin: Origin = "client"
    parts: Annotated[list[CacheName], Meta(max_length=MAX_PARTS)] = []
    evicted: Annotated[list[Form], Meta(max_length=len(FORMS))] = []
    owner: Word = ""
    prefill_ms: dict[Form, Milliseconds] = {}

    @property
    def content(self) -> Content:
        return Content(self.prompt, self.messages, self.tools)

    @property
    def namespace(self) -> Namespace:
        return Namespace.of(self.model, self.owner)

    @property
    def key(self) -> CacheKey:
        return CacheKey(self.namespace, self.name)

    @property
    def size_bytes(self) -> int:
        """Bytes of its files."""
        return self.identity[2] + sum(self.forms[form].state_bytes for form in self.sidecar_forms)

    @property
    def sidecar_forms(self) -> list[Form]:
        """The forms with a sidecar file."""
        return [form for form, stored in self.forms.items() if stored.in_sidecar]

    def without_states(self) -> Entry:
        """The entry after the eviction of its states."""
        evicted = [form for form in FORMS if form in self.forms or form in self.evicted]
        return replace(self, forms={}, evicted=evicted)

    @property
    def expires(self) -> float | None:
        """When it expires unless it is used, in seconds since 1970; None: never."""
        ttl = self.retention.ttl_seconds
        return None if ttl is None else self.updated + ttl

    @property
    def cost_ms(self) -> float:
        """Milliseconds to compute its states."""
        return sum(self.prefill_ms.values()) or self.build_ms

    @property
    def ms_per_token(self) -> float:
        """Milliseconds to compute one token of its states."""
        return self.cost_ms / max(sum(form.n_tokens for form in self.forms.values()), 1)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of its states and their token ids."""
        return sum(form.state_bytes + 4 * form.n_tokens for form in self.forms.values())

    @property
    def n_tokens(self) -> int:
        """Number of tokens of the longest form."""
        return max((form.n_tokens for form in self.forms.values()), default=0)
