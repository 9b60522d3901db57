"""A model as one API key uses it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from headstart.caches.entry import Fingerprint
from headstart.config.settings import Settings
from headstart.engine.client import EngineClient
from headstart.errors import BadRequest, ContextLengthExceeded
from headstart.names import CacheKey, Namespace
from headstart.prompt.process.requests import PromptRequests
from headstart.prompt.vocabulary import Vocabulary
from headstart.protocol import ModelInfo

if TYPE_CHECKING:
    from headstart.service.models.model import ServedModel


class TenantModel:
    """A served model and the `owner` of a request: the name of its API key, or "" for the public. The owner
    determines which caches the request finds. Create one for each request."""

    __slots__ = ("owner", "served")

    def __init__(self, served: ServedModel, owner: str) -> None:
        self.served = served
        self.owner = owner

    def for_owner(self, owner: str) -> TenantModel:
        """The same model for requests of `owner`."""
        return self if owner == self.owner else TenantModel(self.served, owner)

    @property
    def namespace(self) -> Namespace:
        """The namespace of the owner's caches."""
        return Namespace.of(self.name, self.owner)

    def key(self, name: str) -> CacheKey:
        """The key of the owner's cache of this name."""
        return CacheKey(self.namespace, name)

    @property
    def name(self) -> str:
        return self.served.name

    @property
    def settings(self) -> Settings:
        return self.served.settings

    @property
    def engine(self) -> EngineClient:
        return self.served.engine

    @property
    def prompts(self) -> PromptRequests:
        """Raises ModelLoading until the engine has been ready once."""
        return PromptRequests(self.served.prompt_process, self.owner, self.info.can_cut)

    @property
    def vocabulary(self) -> Vocabulary:
        """Raises ModelLoading until the prompt process knows it."""
        return self.served.vocabulary

    @property
    def info(self) -> ModelInfo:
        """Raises ModelLoading until the engine has been ready once."""
        return self.served.info

    @property
    def fingerprint(self) -> Fingerprint:
        """Raises ModelLoading until the engine has been ready once."""
        return self.served.fingerprint

    def text(self, tokens: Sequence[int], *, param: str) -> str:
        """The text of these tokens for an engine that takes text; "" for other engines. Raises BadRequest for
        a NUL character, which would end the text."""
        text = self.vocabulary.text(tokens) if self.info.takes_text else ""
        if "\0" in text:
            raise BadRequest("The NPU's runtime takes no text with a NUL character.", param=param)
        return text

    def check_fits(self, n_tokens: int, *, param: str) -> None:
        """Raises ContextLengthExceeded unless a prompt of `n_tokens` leaves room for an answer."""
        if n_tokens >= self.info.n_ctx:
            raise ContextLengthExceeded(n_tokens, self.info.n_ctx, param=param)
