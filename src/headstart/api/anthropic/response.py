"""The writer of answers in the format of Anthropic's Messages API."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator

import msgspec

from headstart.api.anthropic.errors import anthropic_body
from headstart.api.fields.usage import ending, usage
from headstart.api.sse import as_named_event
from headstart.api.writer import Json, Opens
from headstart.errors import HeadstartError
from headstart.json_scan import check_json
from headstart.service.interface.answer import Delta, Ended, PromptProgress, Result
from headstart.service.origins.breakpoints import BreakpointPlan

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
DELTAS = {"text": "text_delta", "thinking": "thinking_delta", "tool_use": "input_json_delta"}
FIELDS = {"text": "text", "thinking": "thinking", "tool_use": "partial_json"}
PING = as_named_event({"type": "ping"})


class Blocks:
    """The content blocks of an answer while it grows. `with_reasoning`: include reasoning as a block."""

    def __init__(self, *, with_reasoning: bool) -> None:
        self.with_reasoning = with_reasoning
        self.content: list[Json] = []
        # The type of the open block and, for a call, the call's index.
        self._open: tuple[str, int] | None = None
        self._arguments = ""

    def add(self, delta: Delta) -> Iterator[Json]:
        """Adds a delta and yields its events."""
        if delta.reasoning and self.with_reasoning:
            yield from self._grow(("thinking", 0), {"thinking": "", "signature": ""}, delta.reasoning)
        if delta.text:
            yield from self._grow(("text", 0), {"text": ""}, delta.text)
        if call := delta.call:
            opening = {"id": call.id, "name": call.name, "input": {}}
            yield from self._grow(("tool_use", call.index), opening, call.arguments)

    def close(self) -> Iterator[Json]:
        """Ends the open block, if any."""
        if self._open is None:
            return
        if self._open[0] == "tool_use":
            self.content[-1]["input"] = _arguments(self._arguments)
        self._open, self._arguments = None, ""
        yield {"type": "content_block_stop", "index": len(self.content) - 1}

    def _grow(self, block: tuple[str, int], opening: Json, piece: str) -> Iterator[Json]:
        kind = block[0]
        if block != self._open:
            yield from self.close()
            self._open = block
            self.content.append({"type": kind, **opening})
            index = len(self.content) - 1
            yield {"type": "content_block_start", "index": index, "content_block": {"type": kind, **opening}}
        if not piece:
            return
        if kind == "tool_use":
            self._arguments += piece
        else:
            self.content[-1][kind] += piece
        delta = {"type": DELTAS[kind], FIELDS[kind]: piece}
        yield {"type": "content_block_delta", "index": len(self.content) - 1, "delta": delta}


def _arguments(text: str) -> Json:
    """The parsed arguments; empty if they were cut off or exceed the limits of JSON."""
    try:
        check_json(text)
        arguments = msgspec.json.decode(text)
    except ValueError:
        return {}
    return arguments if isinstance(arguments, dict) else {}


class MessageWriter:
    """Writes one message. `prompt_tokens`: the number of the prompt's. `marked`: the states to be stored. A
    stream begins with the figures of the prompt, which the engine knows when it begins to compute it."""

    done = b""
    keep_alive = PING
    opens: Opens = "with_progress"

    def __init__(
        self, model: str, prompt_tokens: int, marked: BreakpointPlan | None, *, with_reasoning: bool
    ) -> None:
        self.head = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "model": model}
        self.prompt_tokens = prompt_tokens
        self.marked = marked or BreakpointPlan()
        self.blocks = Blocks(with_reasoning=with_reasoning)
        self._stop: Json = {"stop_reason": None, "stop_sequence": None}
        self._account: Json = {}
        # Stays 0 in streams of engines that report no progress.
        self._n_cached = 0

    @property
    def body(self) -> Json:
        return {**self.head, "content": self.blocks.content, **self._stop, **self._account}

    def opening(self) -> Iterable[bytes]:
        usage = {**self._prompt_usage(self._n_cached), "output_tokens": 0}
        message: Json = {
            **self.head,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }
        return [as_named_event({"type": "message_start", "message": message}), PING]

    def progress(self, event: PromptProgress) -> Iterable[bytes]:
        self._n_cached = event.cached
        return ()

    def add(self, event: Delta | Ended) -> Iterable[bytes]:
        # A list, because the blocks grow while their events are iterated.
        grown = self.blocks.add(event) if isinstance(event, Delta) else self._end(event)
        return map(as_named_event, list(grown))

    def closing(self, result: Result) -> Iterable[bytes]:
        self._account = {"usage": self._usage(result), **ending(result)}
        last = {"type": "message_delta", "delta": self._stop, **self._account}
        return map(as_named_event, [last, {"type": "message_stop"}])

    def failed(self, error: HeadstartError) -> Iterable[bytes]:
        return [as_named_event(anthropic_body(error))]

    def _end(self, event: Ended) -> Iterator[Json]:
        reason = "stop_sequence" if event.stop is not None else STOP_REASONS[event.finish_reason]
        self._stop = {"stop_reason": reason, "stop_sequence": event.stop}
        return self.blocks.close()

    def _usage(self, result: Result) -> Json:
        ours = {k: v for k, v in usage(result).items() if k.startswith("cache")}
        return {**self._prompt_usage(result.stats.cached_tokens), "output_tokens": result.n_tokens, **ours}

    def _prompt_usage(self, n_cached: int) -> Json:
        """Counts every prompt token once: as read from a cache, written to one, or neither."""
        written = self.marked.written(n_cached)
        n_written = sum(written.values())
        return {
            "input_tokens": self.prompt_tokens - n_cached - n_written,
            "cache_creation_input_tokens": n_written,
            "cache_read_input_tokens": n_cached,
            "cache_creation": {
                "ephemeral_5m_input_tokens": written.get(300.0, 0),
                "ephemeral_1h_input_tokens": written.get(3600.0, 0),
            },
        }
