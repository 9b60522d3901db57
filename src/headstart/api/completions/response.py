"""Writers of chat and text completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence

import msgspec

from headstart.api import sse
from headstart.api.fields.usage import ending, usage
from headstart.api.sse import as_event
from headstart.api.writer import Json, Opens
from headstart.errors import HeadstartError
from headstart.service.interface.answer import (
    Call,
    Choice,
    Delta,
    Ended,
    PromptProgress,
    Result,
    TokenLogprob,
)

# Placeholder for the text in a chunk that is encoded once as a template; occurs in no other field.
PLACEHOLDER = "\0"
LEAST_LOGPROB = -9999.0


class ChatWriter:
    """Writes a chat completion with `n` choices. `id` and `created` are the same in all chunks."""

    done = sse.DONE
    keep_alive = sse.COMMENT
    opens: Opens = "with_answer"
    prefix, object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, n: int = 1, *, include_usage: bool = False) -> None:
        self.head = {"id": self.prefix + uuid.uuid4().hex, "created": int(time.time()), "model": model}
        self.include_usage = include_usage
        # If clients request usage, OpenAI sends `usage: null` in every chunk but the last.
        self.extra: Json = {"usage": None} if include_usage else {}
        self._choices = [Choice(index) for index in range(n)]
        self._account: Json = {}
        # Only of a stream: the last choice's end, to be completed by the result.
        self._ended: Json = {}
        self._chunks: TextChunks | None = None

    @property
    def body(self) -> Json:
        return self._object(self.object, [self._choice(choice) for choice in self._choices]) | self._account

    def opening(self) -> Iterable[bytes]:
        self._chunks = TextChunks(self, len(self._choices))
        openings = (self.opening_chunk(choice.index) for choice in self._choices)
        return [as_event(each) for each in openings if each]

    def progress(self, event: PromptProgress) -> Iterable[bytes]:
        return (as_event(self.chunk(Delta(event.choice)) | {"prompt_progress": _progress(event)}),)

    def add(self, event: Delta | Ended) -> Iterable[bytes]:
        if not self._chunks:
            self._choices[event.choice].add(event)
            return ()
        if isinstance(event, Delta):
            return (self._chunks.encode(event),)
        ended, self._ended = self._ended, self.chunk(event)
        return (as_event(ended),) if ended else ()

    def closing(self, result: Result) -> Iterable[bytes]:
        self._account = {"usage": usage(result), **ending(result)}
        chunks = [self._ended | ending(result)]
        if self.include_usage:
            chunks.append(self._object(self.chunk_object, []) | {"usage": usage(result)})
        return map(as_event, chunks)

    def failed(self, error: HeadstartError) -> Iterable[bytes]:
        return [sse.failed(error)]

    def chunk(self, event: Delta | Ended) -> Json:
        return self._object(self.chunk_object, [self._chunk_choice(event)]) | self.extra

    def opening_chunk(self, choice: int) -> Json | None:
        delta = {"role": "assistant", "content": ""}
        fields = {"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}
        return self._object(self.chunk_object, [fields]) | self.extra

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
        fields: Json = {"index": event.choice, "delta": {}, "logprobs": None, "finish_reason": None}
        if isinstance(event, Ended):
            return fields | {"finish_reason": event.finish_reason}
        return fields | {"delta": _chat_delta(event), "logprobs": self._logprobs(event.logprobs)}

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> Json | None:
        return {"content": [_logprob(each) for each in logprobs], "refusal": None} if logprobs else None


def _progress(event: PromptProgress) -> Json:
    """The progress with llama-server's field names."""
    return {
        "total": event.total,
        "cache": event.cached,
        "processed": event.processed,
        "time_ms": round(event.ms),
    }


def _chat_delta(delta: Delta) -> Json:
    fields: Json = {}
    if delta.text:
        fields["content"] = delta.text
    if delta.reasoning:
        fields["reasoning_content"] = delta.reasoning
    if call := delta.call:
        opening = {"id": call.id, "type": "function"} if call.id else {}
        named = {"name": call.name} if call.name else {}
        function = {**named, "arguments": call.arguments}
        fields["tool_calls"] = [{"index": call.index, **opening, "function": function}]
    return fields


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


class TextWriter(ChatWriter):
    """Writes a text completion. `echoes`: the text that each choice begins with."""

    prefix, object, chunk_object = "cmpl-", "text_completion", "text_completion"

    def __init__(
        self, model: str, n: int = 1, *, include_usage: bool = False, echoes: Sequence[str] = ()
    ) -> None:
        super().__init__(model, n, include_usage=include_usage)
        self.echoes = echoes

    def opening_chunk(self, choice: int) -> Json | None:
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
        fields: Json = {"index": event.choice, "text": "", "logprobs": None, "finish_reason": None}
        if isinstance(event, Ended):
            return fields | {"finish_reason": event.finish_reason}
        return fields | {"text": event.text, "logprobs": self._logprobs(event.logprobs)}

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


class TextChunks:
    """Encodes chunks quickly: those that contain only text differ only in the text."""

    def __init__(self, writer: ChatWriter, n: int) -> None:
        self.writer = writer
        placeholder = msgspec.json.encode(PLACEHOLDER)
        chunks = (writer.chunk(Delta(choice, PLACEHOLDER)) for choice in range(n))
        self.around = [as_event(chunk).split(placeholder) for chunk in chunks]

    def encode(self, delta: Delta) -> bytes:
        if delta.reasoning or delta.call or delta.logprobs or not delta.text:
            return as_event(self.writer.chunk(delta))
        before, after = self.around[delta.choice]
        return before + msgspec.json.encode(delta.text) + after
