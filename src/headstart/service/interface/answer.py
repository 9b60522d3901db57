"""The answers to a request: deltas while they are generated, choices at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from headstart.prompt.answer_parts import CallDelta

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
