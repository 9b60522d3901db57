"""What is said to OpenAI's Responses API: messages, calls and what they gave, made into a chat."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from headstart.api.fields.generation import Body
from headstart.api.fields.tools import check_arguments
from headstart.api.fields.values import Many, Utf8
from headstart.limits import MAX_MESSAGES
from headstart.service.origins.responses import called

Json = dict[str, Any]


class TextContent(Body):
    type: Literal["input_text", "output_text", "text"] = Field(description="That it is text.")
    text: Utf8 = Field(description="The text.")


class RefusalContent(Body):
    type: Literal["refusal"] = Field(description="That the assistant refused.")
    refusal: Utf8 = Field(description="What it said.")

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
    type: Literal["message"] = Field("message", description="That it is a message; may be left out.")
    role: Literal["user", "assistant", "system", "developer"] = Field(description="Whose message it is.")
    content: Content = Field(description="Its text, or a list of text parts.")

    def add_to(self, chat: list[Json]) -> None:
        role = "system" if self.role == "developer" else self.role
        chat.append({"role": role, "content": _text(self.content)})


class CallItem(Body):
    type: Literal["function_call"] = Field(description="That the assistant called a function.")
    call_id: Utf8 = Field(description="What the call's output refers to it by.")
    name: Utf8 = Field(min_length=1, description="The function.")
    arguments: Utf8 = Field(description="Its arguments, as JSON text.")

    def add_to(self, chat: list[Json]) -> None:
        """The calls of a turn are one message, with what was said before them."""
        if not (chat and chat[-1]["role"] == "assistant"):
            chat.append({"role": "assistant", "content": ""})
        chat[-1].setdefault("tool_calls", []).append(called(self.call_id, self.name, self.arguments))


class OutputItem(Body):
    type: Literal["function_call_output"] = Field(description="That it is what a function answered.")
    call_id: Utf8 = Field(description="The call that it answers.")
    output: Content = Field(description="What it answered: a text, or a list of text parts.")

    def add_to(self, chat: list[Json]) -> None:
        chat.append({"role": "tool", "tool_call_id": self.call_id, "content": _text(self.output)})


class ReasoningItem(Body):
    type: Literal["reasoning"] = Field(
        description="Reasoning of an earlier turn, which models are not given again."
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
    """Raises ValueError. Nothing is known of the items yet."""
    known = (item for item in (items if isinstance(items, list) else []) if isinstance(item, dict))
    texts = (item.get("arguments") for item in known)
    check_arguments(text for text in texts if isinstance(text, str))
    return items


Items = Annotated[Many[Item], Field(max_length=MAX_MESSAGES), BeforeValidator(_with_modest_calls)]
