"""When two messages, or two lists of tools, are the same though they are written differently.

Clients send back what they were sent in their own way: with tools in another order, without white space at
the end of a text, with calls where a cache has the text in which the model wrote them, without reasoning. For
a request that names a cache these are the cache's own, and are not said twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from headstart.contents import arguments_of
from headstart.prompt.answer_parts import Parser, PlainText
from headstart.prompt.chat import UNFINISHED
from headstart.prompt.reasoning import CLOSE, OPEN, ReasoningParser
from headstart.service.interface.answer import Choice, Delta

Json = Mapping[str, Any]
# Creates the parser of calls of the functions with these names; None: of any number of calls.
CallParsers = Callable[[Collection[str], int | None], Parser]


def written_alike(one: Any, other: Any) -> bool:
    """Whether a template makes the same of both: they are equal, and their keys are in the same order."""
    return bool(one == other) and msgspec.json.encode(one) == msgspec.json.encode(other)


def same_tools(one: Sequence[Json], other: Sequence[Json]) -> bool:
    """The order of tools, and of the keys in their schemas, doesn't count."""
    return len(one) == len(other) and _ordered(one) == _ordered(other)


def _ordered(tools: Sequence[Json]) -> list[str]:
    return sorted(json.dumps(tool, sort_keys=True) for tool in tools)


@dataclass(frozen=True)
class SameMessages:
    """Compares messages of caches with messages of requests, for one model. `parser`: creates the parser of
    the model's calls. `reasons`: the model's template has reasoning."""

    parser: CallParsers
    reasons: bool

    def count(self, kept: Sequence[Json], sent: Sequence[Json], tools: Sequence[Json] = ()) -> int:
        """The number of first messages that are the same in both. `tools`: those that the cache's answers may
        call."""
        n = 0
        for one, other in zip(kept, sent, strict=False):
            if not self._is_same(one, other, tools):
                break
            n += 1
        return n

    def _is_same(self, kept: Json, sent: Json, tools: Sequence[Json]) -> bool:
        if kept == sent:
            return True
        if kept["role"] != sent["role"] or kept.get("name") != sent.get("name") or kept.get(UNFINISHED):
            return False
        match kept["role"]:
            case "system":
                return bool(kept["content"].rstrip() == sent["content"].rstrip())
            case "assistant":
                return self._is_same_answer(kept, sent, tools)
        return False

    def _is_same_answer(self, kept: Json, sent: Json, tools: Sequence[Json]) -> bool:
        """Compares answers as they are, then the cache's as a client is sent it: an answer that was stored as
        the model wrote it has its reasoning and calls in its text."""
        text = kept["content"]
        if _agree(Choice(0, text=text), kept, sent):
            return True
        # Most answers that differ needn't be parsed to know that.
        may_agree = sent.get("tool_calls") or OPEN in text or CLOSE in text
        return bool(may_agree) and _agree(self._read(text, tools), kept, sent)

    def _read(self, text: str, tools: Sequence[Json]) -> Choice:
        names = {tool["function"]["name"] for tool in tools}
        rest = self.parser(names, None) if names else PlainText()
        # The prompt may have opened the reasoning.
        inside = self.reasons and CLOSE in text and not text.lstrip().startswith(OPEN)
        parser = ReasoningParser(rest, inside=inside)
        answer = Choice(0)
        for part in [*parser.add(text), *parser.end()]:
            answer.add(Delta(0, part.text, part.reasoning, part.call))
        return answer


def _agree(read: Choice, kept: Json, sent: Json) -> bool:
    """Whether the message sent is the one kept, whose text was read so. Reasoning may be left out."""
    if read.text.strip() != sent["content"].strip():
        return False
    reasoning = kept.get("reasoning_content") or read.reasoning
    if sent.get("reasoning_content", reasoning).strip() != reasoning.strip():
        return False
    stored = [(call.get("id"), *_function(call)) for call in kept.get("tool_calls") or ()]
    written = [(None, call.name, arguments_of(call.arguments or "{}")) for call in read.calls]
    return _same_calls([*written, *stored], sent.get("tool_calls") or [])


def _same_calls(kept: Sequence[tuple[str | None, str, Any]], sent: Sequence[Json]) -> bool:
    """A call that was read from a text has no id; it was sent with one."""
    if len(kept) != len(sent):
        return False
    pairs = zip(kept, sent, strict=True)
    return all(one[1:] == _function(call) and one[0] in (None, call.get("id")) for one, call in pairs)


def _function(call: Json) -> tuple[str, Any]:
    function = call["function"]
    arguments = function.get("arguments") or {}
    return function["name"], arguments_of(arguments) if isinstance(arguments, str) else arguments
