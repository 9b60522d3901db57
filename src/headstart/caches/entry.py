"""What is known about a cache without reading its states."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct
from msgspec.structs import replace

from headstart.caches.index.usage import Time
from headstart.names import NAME, CacheKey, namespace_name

Form = Literal["chat", "completion"]
FORMS: tuple[Form, ...] = ("chat", "completion")
# Caches that one may be composed of.
MAX_PARTS = 8
Identity = tuple[int, int, int, int]
# What fields may be where an entry is read from a file or anything else (`entered.py`).
CacheName = Annotated[str, Meta(pattern=rf"^{NAME.pattern}\Z")]
Milliseconds = Annotated[float, Meta(ge=0, le=1e15)]
Count = Annotated[int, Meta(ge=0, le=1 << 60)]
Word = Annotated[str, Meta(max_length=1000)]
# Who asked for a cache: a client by name; the configuration; nobody, its prompt having been seen often; a
# request that named several caches, of which it is composed; a conversation that was to be kept; or nobody,
# but it is a response, and others may go on from it.
Origin = Literal["client", "declared", "automatic", "derived", "conversation", "response"]
# Why a named state was not used. Those about the request itself leave the state as it is; the state is built
# anew after the others.
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

# What a setting is called where its name isn't clear, and what it is where it isn't named.
WORDS = {"weights": "the format of the weights"}
UNSET = {"weights": "file"}


class Fingerprint(Struct, frozen=True):
    """What a state depends on. `weights` is the SHA-256 of the model file, `engine` the version that computed
    it, `settings` those of the engine that change its bytes, `template` a hash of the chat template."""

    weights: Word
    engine: Word
    settings: Annotated[dict[Word, Word], Meta(max_length=100)]
    template: Word

    def changed_since(self, other: Fingerprint) -> MissReason | None:
        """Why a state with the `other` fingerprint can't be used under this one."""
        if self.weights != other.weights:
            return "model_changed"
        if self.engine != other.engine:
            return "engine_changed"
        if self.settings != other.settings:
            return "settings_changed"
        return None if self.template == other.template else "template_changed"

    def differences(self, other: Fingerprint) -> str:
        """In words, what is another than it was with the `other` fingerprint; "" for nothing."""
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
    """How many tokens a form has, and where its state lies in the file, in bytes from its start; or, `beside`
    it, in a file of its own."""

    n_tokens: Count
    state_offset: Count
    state_bytes: Count
    beside: bool = False


class Content(Struct, frozen=True):
    """What a cache holds the state of: `prompt`, the system message in chats and the leading text in
    completions; or, for chats only, `messages` as templates take them and the `tools` offered in them."""

    prompt: str = ""
    messages: list[dict[str, Any]] = []
    tools: list[dict[str, Any]] = []

    @property
    def forms(self) -> tuple[Form, ...]:
        """Those that there can be."""
        return FORMS if self.prompt else ("chat",)

    @property
    def opening(self) -> list[dict[str, Any]]:
        """The messages that chats with this cache begin with."""
        return [{"role": "system", "content": self.prompt}] if self.prompt else self.messages


class Retention(Struct, frozen=True):
    """How a cache is kept. It ends `ttl_seconds` after it was last written, unless that is None; a `pinned`
    one is never evicted. `description` and `metadata` are the user's own."""

    ttl_seconds: float | None = None
    pinned: bool = False
    description: str = ""
    metadata: dict[str, str] = {}


DEFAULT_RETENTION = Retention()


class Entry(Struct, frozen=True):
    """A cache. Times are seconds since 1970; `identity` is that of the file which was read or written.
    `evicted`: the forms whose states were given up for others; they are computed again when asked for.
    `parts`: the caches a derived one is composed of. `owner`: the API key it belongs to, "" for all.
    `prefill_ms`: what computing each form took, whenever that was; `build_ms` is of the last build alone."""

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
    terms: Retention = DEFAULT_RETENTION
    origin: Origin = "client"
    parts: Annotated[list[CacheName], Meta(max_length=MAX_PARTS)] = []
    evicted: Annotated[list[Form], Meta(max_length=len(FORMS))] = []
    owner: Word = ""
    prefill_ms: dict[Form, Milliseconds] = {}

    @property
    def content(self) -> Content:
        return Content(self.prompt, self.messages, self.tools)

    @property
    def namespace(self) -> str:
        return namespace_name(self.model, self.owner)

    @property
    def key(self) -> CacheKey:
        return CacheKey(self.namespace, self.name)

    @property
    def size_bytes(self) -> int:
        """What its files take."""
        return self.identity[2] + sum(self.forms[form].state_bytes for form in self.beside)

    @property
    def beside(self) -> list[Form]:
        """The forms whose states lie in files of their own."""
        return [form for form, stored in self.forms.items() if stored.beside]

    def without_states(self) -> Entry:
        """It as one whose states were given up."""
        evicted = [form for form in FORMS if form in self.forms or form in self.evicted]
        return replace(self, forms={}, evicted=evicted)

    @property
    def expires(self) -> float | None:
        """When it ends unless it is used, in seconds since 1970; None: never."""
        ttl = self.terms.ttl_seconds
        return None if ttl is None else self.updated + ttl

    @property
    def cost_ms(self) -> float:
        """What computing its states takes."""
        return sum(self.prefill_ms.values()) or self.build_ms

    @property
    def ms_per_token(self) -> float:
        """What computing a token of its states took."""
        return self.cost_ms / max(sum(form.n_tokens for form in self.forms.values()), 1)

    @property
    def tensor_bytes(self) -> int:
        """What of the file is states and their token ids."""
        return sum(form.state_bytes + 4 * form.n_tokens for form in self.forms.values())

    @property
    def n_tokens(self) -> int:
        """Tokens of the longest form."""
        return max((form.n_tokens for form in self.forms.values()), default=0)
