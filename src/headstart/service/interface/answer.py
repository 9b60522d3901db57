"""The answers to a request: as deltas while they come, as choices in the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from headstart.prompt.answer_parts import CallDelta

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class TokenLogprob:
    """A token of the answer, whose text begins at character `offset` of it; `top` are the likeliest tokens in
    its place. Natural logarithms of the model's own probabilities."""

    token: bytes
    logprob: float
    top: Sequence[tuple[bytes, float]]
    offset: int


@dataclass(frozen=True)
class Delta:
    """What the answer number `choice` grows by; never nothing. All tokens have logprobs, those of reasoning
    and calls as well, and they come no later than the text they stand for."""

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
