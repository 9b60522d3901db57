"""The writer of answers in the format of OpenAI's Responses API."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

from headstart.api.fields import usage as fields_usage
from headstart.api.sse import COMMENT, as_named_event
from headstart.api.writer import Json, Opens
from headstart.errors import HeadstartError
from headstart.service.interface.answer import Delta, Ended, PromptProgress, Result

PREFIX = "resp_"


class GrowingItem:
    """One output item while it is written. Its events have no output index and no sequence number yet."""

    prefix = ""
    kind = ""

    def __init__(self, **more: Any) -> None:
        identifier = self.prefix + uuid.uuid4().hex
        self.shown: Json = {"id": identifier, "type": self.kind, "status": "in_progress", **more}
        self.text = ""

    def opened(self) -> Iterator[Json]:
        yield {"type": "response.output_item.added", "item": self.shown | self._content(None)}

    def grown(self, text: str) -> Iterator[Json]:
        self.text += text
        yield from self._grown(text)

    def closed(self, status: str) -> Iterator[Json]:
        yield from self._closed()
        self.shown |= self._content(self.text) | {"status": status}
        yield {"type": "response.output_item.done", "item": self.shown}

    @property
    def _place(self) -> Json:
        return {"item_id": self.shown["id"]}

    def _content(self, text: str | None) -> Json:
        """The fields that hold the item's text; None: no text yet."""
        raise NotImplementedError

    def _grown(self, text: str) -> Iterator[Json]:
        raise NotImplementedError

    def _closed(self) -> Iterator[Json]:
        raise NotImplementedError


class GrowingMessage(GrowingItem):
    prefix, kind, part, event = "msg_", "message", "output_text", "response.output_text"
    fields: ClassVar[Json] = {"role": "assistant"}
    with_text: ClassVar[Json] = {"logprobs": []}
    of_part: ClassVar[Json] = {"annotations": [], "logprobs": []}

    def opened(self) -> Iterator[Json]:
        yield from super().opened()
        yield {"type": "response.content_part.added", **self._place, "part": self._part("")}

    @property
    def _place(self) -> Json:
        return {**super()._place, "content_index": 0}

    def _part(self, text: str) -> Json:
        return {"type": self.part, "text": text, **self.of_part}

    def _content(self, text: str | None) -> Json:
        return self.fields | {"content": [] if text is None else [self._part(text)]}

    def _grown(self, text: str) -> Iterator[Json]:
        if text:
            yield {"type": f"{self.event}.delta", **self._place, "delta": text, **self.with_text}

    def _closed(self) -> Iterator[Json]:
        yield {"type": f"{self.event}.done", **self._place, "text": self.text, **self.with_text}
        yield {"type": "response.content_part.done", **self._place, "part": self._part(self.text)}


class GrowingReasoning(GrowingMessage):
    prefix, kind, part, event = "rs_", "reasoning", "reasoning_text", "response.reasoning_text"
    fields: ClassVar[Json] = {"summary": []}
    with_text: ClassVar[Json] = {}
    of_part: ClassVar[Json] = {}


class GrowingCall(GrowingItem):
    prefix, kind = "fc_", "function_call"

    def __init__(self, index: int, call_id: str, name: str) -> None:
        super().__init__(call_id=call_id, name=name)
        self.index = index

    def _content(self, text: str | None) -> Json:
        return {"arguments": text or ""}

    def _grown(self, text: str) -> Iterator[Json]:
        if text:
            yield {"type": "response.function_call_arguments.delta", **self._place, "delta": text}

    def _closed(self) -> Iterator[Json]:
        fields = {"name": self.shown["name"], "arguments": self.text}
        yield {"type": "response.function_call_arguments.done", **self._place, **fields}


def new_id() -> str:
    return PREFIX + uuid.uuid4().hex


class ResponseWriter:
    """Writes one response. `body` is complete after `closing` or `failed`, also of a stream."""

    done = b""
    keep_alive = COMMENT
    opens: Opens = "at_once"

    def __init__(self, response_id: str, echoed: Json) -> None:
        self.body: Json = {
            "id": response_id,
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            **echoed,
            "output": [],
            "usage": None,
        }
        self._open: GrowingItem | None = None
        self._n_events = 0
        self._was_cut = False

    def opening(self) -> Iterable[bytes]:
        kinds = ("response.created", "response.in_progress")
        return _encoded(self._numbered({"type": kind, "response": self.body}) for kind in kinds)

    def progress(self, _: PromptProgress) -> Iterable[bytes]:
        return ()

    def add(self, event: Delta | Ended) -> Iterable[bytes]:
        return _encoded(self._grown(event))

    def closing(self, result: Result) -> Iterable[bytes]:
        return _encoded(self._completed(result))

    def failed(self, error: HeadstartError) -> Iterable[bytes]:
        return _encoded(self._broken(error))

    def _grown(self, event: Delta | Ended) -> Iterator[Json]:
        if isinstance(event, Ended):
            self._was_cut = event.finish_reason == "length"
            return
        if event.reasoning:
            yield from self._grow_part(GrowingReasoning, event.reasoning)
        if event.text:
            yield from self._grow_part(GrowingMessage, event.text)
        if call := event.call:
            if not isinstance(self._open, GrowingCall) or self._open.index != call.index:
                yield from self._opening(GrowingCall(call.index, call.id, call.name))
            yield from self._growing(call.arguments)

    def _completed(self, result: Result) -> Iterator[Json]:
        status = "incomplete" if self._was_cut else "completed"
        if not (self._open or self.body["output"]):
            yield from self._opening(GrowingMessage())
        yield from self._closing(status)
        self.body |= {"usage": usage(result), **fields_usage.ending(result), "status": status}
        if self._was_cut:
            self.body["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self.body["completed_at"] = int(time.time())
        yield self._numbered({"type": f"response.{status}", "response": self.body})

    def _broken(self, error: HeadstartError) -> Iterator[Json]:
        yield from self._closing("incomplete")
        code = "server_error" if error.status >= 500 else "invalid_prompt"
        self.body |= {"status": "failed", "error": {"code": code, "message": error.message}}
        yield self._numbered({"type": "response.failed", "response": self.body})

    def _grow_part(self, kind: type[GrowingMessage], text: str) -> Iterator[Json]:
        if self._open is None or type(self._open) is not kind:
            yield from self._opening(kind())
        yield from self._growing(text)

    def _growing(self, text: str) -> Iterator[Json]:
        assert self._open
        yield from map(self._placed, self._open.grown(text))

    def _opening(self, item: GrowingItem) -> Iterator[Json]:
        yield from self._closing("completed")
        self._open = item
        yield from map(self._placed, item.opened())

    def _closing(self, status: str) -> Iterator[Json]:
        if item := self._open:
            yield from map(self._placed, item.closed(status))
            self.body["output"].append(item.shown)
            self._open = None

    def _placed(self, event: Json) -> Json:
        return self._numbered({**event, "output_index": len(self.body["output"])})

    def _numbered(self, event: Json) -> Json:
        self._n_events += 1
        return {**event, "sequence_number": self._n_events - 1}


def _encoded(events: Iterable[Json]) -> Iterable[bytes]:
    # A list, because the response grows while its events are iterated.
    return map(as_named_event, list(events))


def usage(result: Result) -> Json:
    """The usage of a chat with this API's field names."""
    account = fields_usage.usage(result)
    n_prompt, n_answer = account.pop("prompt_tokens"), account.pop("completion_tokens")
    cached = account.pop("prompt_tokens_details")
    account.pop("completion_tokens_details", None)
    return {
        "input_tokens": n_prompt,
        "input_tokens_details": cached,
        "output_tokens": n_answer,
        "output_tokens_details": {"reasoning_tokens": min(result.n_reasoning, n_answer)},
        **account,
    }
