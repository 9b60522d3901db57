"""The answers to a request: deltas while they are generated, choices and a result at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from msgspec import Struct

from headstart.caches.entry import MissReason
from headstart.prompt.answer_parts import CallDelta
from headstart.protocol import Stats

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class TokenLogprob:
    """A token of the answer. `offset`: the character of the answer at which its text begins. `top`: the
    likeliest tokens at its position. Values are natural logarithms of the model's own probabilities."""

    token: bytes
    logprob: float
    top: Sequence[tuple[bytes, float]]
    offset: int


@dataclass(frozen=True)
class Delta:
    """An addition to the answer number `choice`, never empty. All tokens have logprobs, also those of
    reasoning and calls, and these come no later than the tokens' text."""

    choice: int
    text: str = ""
    reasoning: str = ""
    call: CallDelta | None = None
    logprobs: Sequence[TokenLogprob] = ()


@dataclass(frozen=True)
class Ended:
    """The answer number `choice` is complete. `stop`: the stop string that ended it."""

    choice: int
    finish_reason: FinishReason
    stop: str | None = None


@dataclass(frozen=True)
class PromptProgress:
    """Prefill for the answer number `choice`, and for all others to the same prompt, has reached `processed`
    of `total` prompt tokens, `ms` milliseconds after it began. The first `cached` of them were not
    evaluated."""

    choice: int
    total: int
    cached: int
    processed: int
    ms: float


@dataclass
class Call:
    """`arguments`: as the model wrote them, JSON unless it was cut off."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class Choice:
    """A whole answer: the sum of its deltas."""

    index: int
    text: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason = "stop"
    stop: str | None = None

    def add(self, event: Delta | Ended) -> None:
        if isinstance(event, Ended):
            self.finish_reason, self.stop = event.finish_reason, event.stop
            return
        self.text += event.text
        self.reasoning += event.reasoning
        self.logprobs += event.logprobs
        if event.call:
            self._add_call(event.call)

    def _add_call(self, call: CallDelta) -> None:
        if call.index == len(self.calls):
            self.calls.append(Call(call.id, call.name))
        self.calls[call.index].arguments += call.arguments


class Explanation(Struct, frozen=True):
    """`matched_tokens` of the closest cache's `cache_tokens` are a prefix of the prompt. `first_difference`:
    the index of the first token that differs; None if all of the cache matches, and then the texts are empty.
    Control tokens are written as their names."""

    closest_cache: str | None
    matched_tokens: int
    cache_tokens: int
    prompt_tokens: int
    first_difference: int | None
    text_before: str
    cache_text: str
    prompt_text: str
    reason: str


@dataclass(frozen=True)
class Result:
    """The result of a request. `n_tokens`: tokens of all answers together. `cache_hit`: None if no cache was
    named, otherwise whether the engine started from its state; all counts are the engine's. `matched`: the
    number of prompt tokens in the closest known state's prefix. `explanation`: only if requested. `saved_as`:
    the name under which the chat is being stored. `warning`: how the answer differs from the request.
    `n_reasoning`: the number of reasoning tokens of the first answer, only if requested."""

    n_tokens: int
    stats: Stats
    cache_hit: bool | None = None
    cache_names: Sequence[str] = ()
    miss: MissReason | None = None
    matched: int = 0
    explanation: Explanation | None = None
    saved_as: str | None = None
    warning: str = ""
    n_reasoning: int = 0


AnswerEvent = PromptProgress | Delta | Ended | Result
