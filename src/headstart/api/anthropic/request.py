"""Bodies of Anthropic's Messages API. Unknown fields are accepted; what a model can't be given is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StringConstraints
from pydantic_core import PydanticCustomError

from headstart.api.anthropic.turns import BETWEEN, Turns
from headstart.api.fields.answer_format import Wanted
from headstart.api.fields.generation import Body, CachedRequest, StopString, asked
from headstart.api.fields.tools import JsonObject
from headstart.api.fields.values import Many, Utf8
from headstart.errors import BadRequest
from headstart.limits import MAX_MESSAGES, MAX_TOOLS
from headstart.protocol import Sampling
from headstart.service.generation.grammars import json_grammar
from headstart.service.interface.options import Breakpoint, Calling, Options

Json = dict[str, Any]
Name = Annotated[Utf8, StringConstraints(min_length=1, max_length=256)]
MOST_MARKS = 4
MOST_STOPS = 64
CHOICES: dict[str, Literal["none", "auto", "required"]] = {
    "none": "none",
    "auto": "auto",
    "any": "required",
    "tool": "required",
}
# How long what is marked is kept after its last use.
TTL_SECONDS = {"5m": 300.0, "1h": 3600.0}


class CacheControl(Body):
    type: Literal["ephemeral"] = Field(description="The only kind.")
    ttl: Literal["5m", "1h"] = Field("5m", description="How long to keep it after its last use.")

    @property
    def seconds(self) -> float:
        return TTL_SECONDS[self.ttl]


class Marked(Body):
    cache_control: CacheControl | None = Field(None, description="Keep the prompt's state up to here.")

    @property
    def mark(self) -> float | None:
        """How many seconds it is to be kept; None where it isn't marked."""
        return None if self.cache_control is None else self.cache_control.seconds


class TextBlock(Marked):
    type: Literal["text"] = Field(description="A text.")
    text: Utf8 = Field(description="The text itself.")


Texts = Many[TextBlock]


class ToolUseBlock(Marked):
    type: Literal["tool_use"] = Field(description="A call that the model made.")
    id: Utf8 = Field(description="What its result refers to.")
    name: Name = Field(description="The tool's name.")
    input: JsonObject = Field(description="The arguments.")


def _unreadable(kind: str) -> str:
    raise PydanticCustomError("unreadable", "This server's models read text only, no {kind}", {"kind": kind})


class UnreadableBlock(Body):
    type: Annotated[Literal["image", "document", "search_result"], AfterValidator(_unreadable)] = Field(
        description="Refused: models read text only."
    )


ResultBlock = Annotated[TextBlock | UnreadableBlock, Field(discriminator="type")]


class ToolResultBlock(Marked):
    type: Literal["tool_result"] = Field(description="What a tool said.")
    tool_use_id: Utf8 = Field(description="The call's id.")
    content: Utf8 | Many[ResultBlock] | None = Field(None, description="A text, or texts.")
    is_error: bool | None = Field(None, description="Not told to the model.")

    @property
    def text(self) -> str:
        if not isinstance(self.content, list):
            return self.content or ""
        return BETWEEN.join(block.text for block in self.content if isinstance(block, TextBlock))

    @property
    def mark(self) -> float | None:
        inner = self.content if isinstance(self.content, list) else []
        marks = [super().mark, *(block.mark for block in inner if isinstance(block, TextBlock))]
        return max((mark for mark in marks if mark), default=None)


class ThinkingBlock(Body):
    type: Literal["thinking", "redacted_thinking"] = Field(description="Earlier reasoning: left out.")


AssistantBlock = Annotated[TextBlock | ToolUseBlock | ThinkingBlock, Field(discriminator="type")]
UserBlock = Annotated[TextBlock | ToolResultBlock | UnreadableBlock, Field(discriminator="type")]


class UserTurn(Body):
    role: Literal["user"] = Field(description="Who says it.")
    content: Utf8 | Annotated[Many[UserBlock], Field(min_length=1)] = Field(
        description="A text, or blocks of text and tools' results."
    )

    def add_to(self, turns: Turns) -> None:
        if isinstance(self.content, str):
            turns.add_text("user", self.content)
            return
        for block in self.content:
            match block:
                case TextBlock():
                    turns.add_text("user", block.text)
                    turns.mark(block.mark)
                case ToolResultBlock():
                    turns.add_result(block.tool_use_id, block.text)
                    turns.mark(block.mark)


class AssistantTurn(Body):
    role: Literal["assistant"] = Field(description="Who says it.")
    content: Utf8 | Many[AssistantBlock] = Field(description="A text, or blocks of text and calls of tools.")

    def add_to(self, turns: Turns) -> None:
        turns.add_text("assistant", "")
        for block in self.content if isinstance(self.content, list) else []:
            if isinstance(block, TextBlock):
                turns.add_text("assistant", block.text)
            elif isinstance(block, ToolUseBlock):
                turns.add_call(block.id, block.name, block.input)
        if isinstance(self.content, str):
            turns.add_text("assistant", self.content)
            return
        # What a model says is kept whole or not at all.
        for block in self.content:
            turns.mark(block.mark if isinstance(block, Marked) else None)


class SystemTurn(Body):
    role: Literal["system"] = Field(description="Who says it.")
    content: Utf8 | Texts = Field(description="A text, or blocks of text.")

    def add_to(self, turns: Turns) -> None:
        if isinstance(self.content, str):
            turns.add_text("system", self.content)
            return
        for block in self.content:
            turns.add_text("system", block.text)
            turns.mark(block.mark)


Turn = Annotated[UserTurn | AssistantTurn | SystemTurn, Field(discriminator="role")]


class OutputFormat(Body):
    type: Literal["json_schema"] = Field(description="The only kind.")
    schema_: JsonObject = Field(alias="schema", description="What the answer, which is JSON, must match.")


class OutputConfig(Body):
    """How much effort is made is accepted, and changes nothing."""

    format: OutputFormat | None = Field(None, description="The form of the answer.")


class CustomTool(Marked):
    type: Literal["custom"] | None = Field(None, description="Tools that run elsewhere are not supported.")
    name: Name = Field(description="How the model calls it.")
    description: Utf8 | None = Field(None, description="What it is for.")
    input_schema: JsonObject = Field(description="The JSON schema of its arguments.")

    def function(self) -> Json:
        """As chat templates take it."""
        described = {"description": self.description} if self.description else {}
        function = {"name": self.name, **described, "parameters": self.input_schema}
        return {"type": "function", "function": function}


class ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"] = Field(
        description="Whether the model may or must call one."
    )
    name: Name | None = Field(None, description="With `tool`: which one.")
    disable_parallel_tool_use: bool = Field(False, description="At most one call.")

    def calling(self) -> Calling:
        """Raises BadRequest for one tool that has no name."""
        if self.type == "tool" and self.name is None:
            raise BadRequest("tool_choice of type tool needs the tool's name.", param="tool_choice")
        choice = CHOICES[self.type]
        name = self.name if self.type == "tool" else None
        return Calling(choice, name, parallel=not self.disable_parallel_tool_use)


class Thinking(Body):
    type: Literal["enabled", "adaptive", "disabled"] = Field(description="Whether reasoning is shown.")
    budget_tokens: int | None = Field(None, ge=0, description="Accepted; reasoning is not limited by it.")


class CountRequest(CachedRequest):
    """What makes the prompt."""

    messages: Annotated[Many[Turn], Field(max_length=MAX_MESSAGES)] = Field(
        min_length=1, description="The turns so far; a last one of the assistant's is continued."
    )
    system: Utf8 | Texts | None = Field(None, description="The system prompt.")
    tools: Annotated[Many[CustomTool], Field(max_length=MAX_TOOLS)] | None = Field(
        None, description="Functions that the model may call."
    )
    tool_choice: ToolChoice | None = Field(None, description="Whether the model may or must call a tool.")
    thinking: Thinking | None = Field(None, description="Whether reasoning is shown as a block of its own.")
    cache_control: CacheControl | None = Field(None, description="Marks the last block.")

    def chat(self) -> tuple[list[Json], list[Json], list[Breakpoint]]:
        """Messages and tools as templates take them, and what is marked. Raises BadRequest for a mark too
        many."""
        turns = Turns()
        tools = self.tools or []
        tools_mark = tools[-1].mark if tools else None
        if self.system:
            SystemTurn(role="system", content=self.system).add_to(turns)
        turns.mark(tools_mark)
        for turn in self.messages:
            turn.add_to(turns)
        if self.cache_control:
            turns.mark(self.cache_control.seconds)
        n_marks = len(turns.marks) + sum(tool.mark is not None for tool in tools[:-1])
        if n_marks > MOST_MARKS:
            raise BadRequest(
                f"{n_marks} blocks have cache_control; {MOST_MARKS} is the most.", param="cache_control"
            )
        return turns.messages, [tool.function() for tool in tools], turns.placed()


class MessagesRequest(CountRequest):
    max_tokens: int = Field(
        ge=0, description="Tokens of the answer at most; 0: only keep what is marked, or compute the prompt."
    )
    stop_sequences: list[StopString] | None = Field(
        None, max_length=MOST_STOPS, description="Texts that end the answer."
    )
    stream: bool | None = Field(False, description="Send the answer as server-sent events.")
    temperature: float | None = Field(None, ge=0, le=1, description="0 is greedy.")
    top_p: float | None = Field(None, ge=0, le=1, description="As in chat completions.")
    top_k: int | None = Field(None, ge=0, lt=1 << 31, description="As in chat completions.")
    output_config: OutputConfig | None = Field(None, description="What the answer is to be like.")
    cache_prompt: bool = Field(True, description="False: evaluate every prompt token.")
    explain_cache: bool = Field(False, description="Tell why the request started from a cache, or didn't.")

    def options(self, marks: list[Breakpoint]) -> Options:
        """What the request wants, but for the form of its answer. Raises BadRequest."""
        names = ("temperature", "top_p", "top_k")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return Options(
            max_tokens=self.max_tokens,
            sampling=Sampling(**given),
            stop=self.stop_sequences or [],
            use_cache=self.names,
            reuse=self.cache_prompt,
            explain=self.explain_cache,
            given=asked(self),
            marks=marks,
            calling=self.tool_choice.calling() if self.tool_choice else Calling(),
        )

    def wanted(self) -> Wanted | None:
        """The form that the answer must have. Raises BadRequest."""
        form = self.output_config and self.output_config.format
        return Wanted(json_grammar(form.schema_, "output_config"), "output_config") if form else None

    @property
    def shows_reasoning(self) -> bool:
        return self.thinking is not None and self.thinking.type != "disabled"
