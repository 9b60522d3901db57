"""Answers in OpenAI's format: complete, or in chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from typing import Any

import msgspec

from headstart.api.fields.usage import ending, usage
from headstart.api.sse import as_event
from headstart.service.interface.answer import Call, Choice, Delta, Ended, Result, TokenLogprob

Json = dict[str, Any]
Events = AsyncGenerator[Delta | Ended | Result, None]
# Placeholder for the text in a chunk that is encoded once as a template; occurs in no other field.
MARK = "\0"
LEAST_LOGPROB = -9999.0


class Chat:
    """The format of chat completions. `id` and `created` are the same in all chunks of an answer."""

    prefix, object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str) -> None:
        self.head = {"id": self.prefix + uuid.uuid4().hex, "created": int(time.time()), "model": model}

    def whole(self, choices: Sequence[Choice], result: Result) -> Json:
        account = {"usage": usage(result), **ending(result)}
        return self._object(self.object, [self._choice(choice) for choice in choices]) | account

    def chunk(self, event: Delta | Ended) -> Json:
        return self._object(self.chunk_object, [self._chunk_choice(event)])

    def usage_chunk(self, result: Result) -> Json:
        return self._object(self.chunk_object, []) | {"usage": usage(result)}

    def opening(self, choice: int) -> Json | None:
        delta = {"role": "assistant", "content": ""}
        told = {"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}
        return self._object(self.chunk_object, [told])

    def _object(self, kind: str, choices: list[Json]) -> Json:
        return {"object": kind, **self.head, "choices": choices}

    def _choice(self, choice: Choice) -> Json:
        message: Json = {"role": "assistant", "content": choice.text}
        if choice.reasoning:
            message["reasoning_content"] = choice.reasoning
        if choice.calls:
            message["content"] = choice.text or None
            message["tool_calls"] = [_call(call) for call in choice.calls]
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
        }

    def _chunk_choice(self, event: Delta | Ended) -> Json:
        told: Json = {"index": event.choice, "delta": {}, "logprobs": None, "finish_reason": None}
        if isinstance(event, Ended):
            return told | {"finish_reason": event.finish_reason}
        return told | {"delta": _chat_delta(event), "logprobs": self._logprobs(event.logprobs)}

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> Json | None:
        return {"content": [_logprob(each) for each in logprobs], "refusal": None} if logprobs else None


def _chat_delta(delta: Delta) -> Json:
    told: Json = {}
    if delta.text:
        told["content"] = delta.text
    if delta.reasoning:
        told["reasoning_content"] = delta.reasoning
    if call := delta.call:
        opening = {"id": call.id, "type": "function"} if call.id else {}
        named = {"name": call.name} if call.name else {}
        function = {**named, "arguments": call.arguments}
        told["tool_calls"] = [{"index": call.index, **opening, "function": function}]
    return told


def _call(call: Call) -> Json:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _logprob(logprob: TokenLogprob) -> Json:
    top = [_token(token, value) for token, value in logprob.top]
    return _token(logprob.token, logprob.logprob) | {"top_logprobs": top}


def _token(token: bytes, logprob: float) -> Json:
    return {"token": token.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(token)}


def _finite(logprob: float) -> float:
    """OpenAI's value for practically impossible tokens, whose log-probability may be minus infinity."""
    return max(logprob, LEAST_LOGPROB)


class Completion(Chat):
    """The format of text completions and of their chunks. `echoes`: the text that each choice begins with."""

    prefix, object, chunk_object = "cmpl-", "text_completion", "text_completion"

    def __init__(self, model: str, echoes: Sequence[str] = ()) -> None:
        super().__init__(model)
        self.echoes = echoes

    def opening(self, choice: int) -> Json | None:
        echo = self._echo(choice)
        return self.chunk(Delta(choice, echo)) if echo else None

    def _echo(self, choice: int) -> str:
        return self.echoes[choice] if self.echoes else ""

    def _choice(self, choice: Choice) -> Json:
        return {
            "index": choice.index,
            "text": self._echo(choice.index) + choice.text,
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
        }

    def _chunk_choice(self, event: Delta | Ended) -> Json:
        told: Json = {"index": event.choice, "text": "", "logprobs": None, "finish_reason": None}
        if isinstance(event, Ended):
            return told | {"finish_reason": event.finish_reason}
        return told | {"text": event.text, "logprobs": self._logprobs(event.logprobs)}

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> Json | None:
        """OpenAI's legacy format: `top_logprobs` always includes the token itself."""
        if not logprobs:
            return None
        return {
            "tokens": [_written(each.token) for each in logprobs],
            "token_logprobs": [_finite(each.logprob) for each in logprobs],
            "top_logprobs": [
                {_written(token): _finite(value) for token, value in [*each.top, (each.token, each.logprob)]}
                for each in logprobs
            ],
            "text_offset": [each.offset for each in logprobs],
        }


def _written(token: bytes) -> str:
    """The token's text, or OpenAI's notation for bytes that are part of a character."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


async def whole(events: Events, shape: Chat, n: int) -> Json:
    choices = [Choice(index) for index in range(n)]
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Result):
                return shape.whole(choices, event)
            choices[event.choice].add(event)
    raise AssertionError("an answer ends with its result")


async def stream(events: Events, shape: Chat, n: int, include_usage: bool) -> AsyncGenerator[bytes, None]:
    """The answer's events; events to be sent together are joined."""
    # If clients request usage, OpenAI sends `usage: null` in every chunk but the last.
    extra: Json = {"usage": None} if include_usage else {}
    pieces = TextChunks(shape, n, extra)
    # Sent with the first event, which exists when the stream begins or is late anyway.
    waiting = b"".join(as_event(each | extra) for each in _openings(shape, n))
    ended: Json = {}
    async with aclosing(events):
        async for event in events:
            match event:
                case Delta():
                    yield waiting + pieces.encode(event)
                    waiting = b""
                case Ended():
                    if ended:
                        yield waiting + as_event(ended)
                        waiting = b""
                    ended = shape.chunk(event) | extra
                case Result():
                    account = as_event(shape.usage_chunk(event)) if include_usage else b""
                    yield waiting + as_event(ended | ending(event)) + account


def _openings(shape: Chat, n: int) -> Iterable[Json]:
    return filter(None, (shape.opening(choice) for choice in range(n)))


class TextChunks:
    """Encodes chunks quickly: those that contain only text differ only in the text."""

    def __init__(self, shape: Chat, n: int, extra: Json) -> None:
        self.shape = shape
        self.extra = extra
        mark = msgspec.json.encode(MARK)
        chunks = (shape.chunk(Delta(choice, MARK)) | extra for choice in range(n))
        self.around = [as_event(chunk).split(mark) for chunk in chunks]

    def encode(self, delta: Delta) -> bytes:
        if delta.reasoning or delta.call or delta.logprobs or not delta.text:
            return as_event(self.shape.chunk(delta) | self.extra)
        before, after = self.around[delta.choice]
        return before + msgspec.json.encode(delta.text) + after
