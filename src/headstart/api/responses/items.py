"""Input items of OpenAI's Responses API (messages, calls, outputs) and their conversion to a chat."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from headstart.api.fields.generation import Body
from headstart.api.fields.tools import check_arguments
from headstart.api.fields.values import Many, Utf8
from headstart.limits import MAX_MESSAGES
from headstart.service.origins.responses import tool_call

Json = dict[str, Any]


class TextContent(Body):
    type: Literal["input_text", "output_text", "text"] = Field(description="A part of text.")
    text: Utf8 = Field(description="The text.")


class RefusalContent(Body):
    type: Literal["refusal"] = Field(description="A refusal by the assistant.")
    refusal: Utf8 = Field(description="The refusal's text.")

    @property
    def text(self) -> str:
        return self.refusal


PARTS = Discriminator(
    "type",
    custom_error_type="unsupported_part",
    custom_error_message="Content is text here, in parts of input_text, output_text or refusal",
)
Content = Utf8 | Many[Annotated[TextContent | RefusalContent, PARTS]]


def _text(content: Content) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


class MessageItem(Body):
    type: Literal["message"] = Field("message", description="A message; may be omitted.")
    role: Literal["user", "assistant", "system", "developer"] = Field(description="The message's author.")
    content: Content = Field(description="The text, or a list of text parts.")

    def add_to(self, chat: list[Json]) -> None:
        role = "system" if self.role == "developer" else self.role
        chat.append({"role": role, "content": _text(self.content)})


class CallItem(Body):
    type: Literal["function_call"] = Field(description="A function call by the assistant.")
    call_id: Utf8 = Field(description="The call's id, to which its output refers.")
    name: Utf8 = Field(min_length=1, description="The function's name.")
    arguments: Utf8 = Field(description="The arguments as JSON text.")

    def add_to(self, chat: list[Json]) -> None:
        """Adds the call to the assistant's last message, so that text and calls of a turn are one message."""
        if not (chat and chat[-1]["role"] == "assistant"):
            chat.append({"role": "assistant", "content": ""})
        chat[-1].setdefault("tool_calls", []).append(tool_call(self.call_id, self.name, self.arguments))


class OutputItem(Body):
    type: Literal["function_call_output"] = Field(description="The output of a function call.")
    call_id: Utf8 = Field(description="The call's id.")
    output: Content = Field(description="The output: a text, or a list of text parts.")

    def add_to(self, chat: list[Json]) -> None:
        chat.append({"role": "tool", "tool_call_id": self.call_id, "content": _text(self.output)})


class ReasoningItem(Body):
    type: Literal["reasoning"] = Field(
        description="Reasoning of an earlier turn. Accepted; the model does not see it."
    )

    def add_to(self, chat: list[Json]) -> None:
        pass


def _kind(item: Any) -> str:
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "message")
    return kind if isinstance(kind, str) else "message"


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[OutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(
        _kind,
        custom_error_type="unsupported_item",
        custom_error_message="Items are messages, function_call, function_call_output and reasoning; "
        "others are not supported",
    ),
]


def _with_modest_calls(items: Any) -> Any:
    """Runs before validation, so the items may be anything. Raises ValueError."""
    known = (item for item in (items if isinstance(items, list) else []) if isinstance(item, dict))
    texts = (item.get("arguments") for item in known)
    check_arguments(text for text in texts if isinstance(text, str))
    return items


Items = Annotated[Many[Item], Field(max_length=MAX_MESSAGES), BeforeValidator(_with_modest_calls)]
