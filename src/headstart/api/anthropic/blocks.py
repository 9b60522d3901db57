"""Content blocks in request bodies of Anthropic's Messages API, and the breakpoints that they set."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, StringConstraints
from pydantic_core import PydanticCustomError

from headstart.api.anthropic.turns import BETWEEN
from headstart.api.fields.generation import Body
from headstart.api.fields.tools import JsonObject
from headstart.api.fields.values import Many, Utf8

Name = Annotated[Utf8, StringConstraints(min_length=1, max_length=256)]
# Retention after the last use.
TTL_SECONDS = {"5m": 300.0, "1h": 3600.0}


class CacheControl(Body):
    type: Literal["ephemeral"] = Field(description="The only type.")
    ttl: Literal["5m", "1h"] = Field("5m", description="Retention after the last use: 5 minutes or 1 hour.")

    @property
    def seconds(self) -> float:
        return TTL_SECONDS[self.ttl]


class CacheableBlock(Body):
    cache_control: CacheControl | None = Field(
        None, description="Breakpoint: store the prompt's state up to the end of this block."
    )

    @property
    def ttl_seconds(self) -> float | None:
        """Retention in seconds after the last use; None without a breakpoint."""
        return None if self.cache_control is None else self.cache_control.seconds


class TextBlock(CacheableBlock):
    type: Literal["text"] = Field(description="A block of text.")
    text: Utf8 = Field(description="The text.")


Texts = Many[TextBlock]


class ToolUseBlock(CacheableBlock):
    type: Literal["tool_use"] = Field(description="A tool call by the model.")
    id: Utf8 = Field(description="The call's id, to which its result refers.")
    name: Name = Field(description="The tool's name.")
    input: JsonObject = Field(description="The arguments.")


def _unreadable(kind: str) -> str:
    raise PydanticCustomError("unreadable", "This server's models read text only, no {kind}", {"kind": kind})


class UnreadableBlock(Body):
    type: Annotated[Literal["image", "document", "search_result"], AfterValidator(_unreadable)] = Field(
        description="Refused: models read text only."
    )


ResultBlock = Annotated[TextBlock | UnreadableBlock, Field(discriminator="type")]


class ToolResultBlock(CacheableBlock):
    type: Literal["tool_result"] = Field(description="The result of a tool call.")
    tool_use_id: Utf8 = Field(description="The call's id.")
    content: Utf8 | Many[ResultBlock] | None = Field(None, description="A text, or blocks of text.")
    is_error: bool | None = Field(None, description="Accepted and ignored.")

    @property
    def text(self) -> str:
        if not isinstance(self.content, list):
            return self.content or ""
        return BETWEEN.join(block.text for block in self.content if isinstance(block, TextBlock))

    @property
    def ttl_seconds(self) -> float | None:
        inner = self.content if isinstance(self.content, list) else []
        blocks = (block for block in inner if isinstance(block, TextBlock))
        given = [super().ttl_seconds, *(block.ttl_seconds for block in blocks)]
        return max((seconds for seconds in given if seconds), default=None)


class ThinkingBlock(Body):
    type: Literal["thinking", "redacted_thinking"] = Field(
        description="Reasoning of an earlier turn. Accepted; the model does not see it."
    )


AssistantBlock = Annotated[TextBlock | ToolUseBlock | ThinkingBlock, Field(discriminator="type")]
UserBlock = Annotated[TextBlock | ToolResultBlock | UnreadableBlock, Field(discriminator="type")]
