"""Request bodies of Anthropic's Messages API. Unknown fields are accepted, images and documents refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from headstart.api.anthropic.blocks import (
    AssistantBlock,
    CacheableBlock,
    CacheControl,
    Name,
    TextBlock,
    Texts,
    ToolResultBlock,
    ToolUseBlock,
    UserBlock,
)
from headstart.api.anthropic.turns import Turns
from headstart.api.fields.generation import Body, CachedRequest, StopString, given_parameters
from headstart.api.fields.tools import JsonObject
from headstart.api.fields.values import Many, Utf8
from headstart.errors import BadRequest
from headstart.limits import MAX_MESSAGES, MAX_TOOLS
from headstart.protocol import Sampling
from headstart.service.generation.grammars import json_grammar
from headstart.service.interface.options import AnswerGrammar, Breakpoint, Calling, Options

Json = dict[str, Any]
MAX_BREAKPOINTS = 4
MOST_STOPS = 64
CHOICES: dict[str, Literal["none", "auto", "required"]] = {
    "none": "none",
    "auto": "auto",
    "any": "required",
    "tool": "required",
}


class UserTurn(Body):
    role: Literal["user"] = Field(description="The author of the turn.")
    content: Utf8 | Annotated[Many[UserBlock], Field(min_length=1)] = Field(
        description="A text, or blocks of text and tool results."
    )

    def add_to(self, turns: Turns) -> None:
        if isinstance(self.content, str):
            turns.add_text("user", self.content)
            return
        for block in self.content:
            match block:
                case TextBlock():
                    turns.add_text("user", block.text)
                    turns.add_breakpoint(block.ttl_seconds)
                case ToolResultBlock():
                    turns.add_result(block.tool_use_id, block.text)
                    turns.add_breakpoint(block.ttl_seconds)


class AssistantTurn(Body):
    role: Literal["assistant"] = Field(description="The author of the turn.")
    content: Utf8 | Many[AssistantBlock] = Field(description="A text, or blocks of text and tool calls.")

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
        # A breakpoint follows the assistant's whole text, which is stored whole or not at all.
        for block in self.content:
            turns.add_breakpoint(block.ttl_seconds if isinstance(block, CacheableBlock) else None)


class SystemTurn(Body):
    role: Literal["system"] = Field(description="The author of the turn.")
    content: Utf8 | Texts = Field(description="A text, or blocks of text.")

    def add_to(self, turns: Turns) -> None:
        if isinstance(self.content, str):
            turns.add_text("system", self.content)
            return
        for block in self.content:
            turns.add_text("system", block.text)
            turns.add_breakpoint(block.ttl_seconds)


Turn = Annotated[UserTurn | AssistantTurn | SystemTurn, Field(discriminator="role")]


class OutputFormat(Body):
    type: Literal["json_schema"] = Field(description="The only type.")
    schema_: JsonObject = Field(alias="schema", description="The JSON schema that the answer must match.")


class OutputConfig(Body):
    """`effort` is accepted and ignored."""

    format: OutputFormat | None = Field(None, description="The format of the answer.")


class CustomTool(CacheableBlock):
    type: Literal["custom"] | None = Field(
        None, description="Only `custom`: tools that run on a server are not supported."
    )
    name: Name = Field(description="The tool's name.")
    description: Utf8 | None = Field(None, description="The tool's purpose.")
    input_schema: JsonObject = Field(description="The JSON schema of the arguments.")

    def function(self) -> Json:
        """The tool in the format of chat templates."""
        described = {"description": self.description} if self.description else {}
        function = {"name": self.name, **described, "parameters": self.input_schema}
        return {"type": "function", "function": function}


class ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"] = Field(
        description="Whether the model may or must call a tool."
    )
    name: Name | None = Field(None, description="For type `tool`: the tool's name.")
    disable_parallel_tool_use: bool = Field(False, description="True: at most one call.")

    def calling(self) -> Calling:
        """Raises BadRequest for type `tool` without a name."""
        if self.type == "tool" and self.name is None:
            raise BadRequest("tool_choice of type tool needs the tool's name.", param="tool_choice")
        choice = CHOICES[self.type]
        name = self.name if self.type == "tool" else None
        return Calling(choice, name, parallel=not self.disable_parallel_tool_use)


class Thinking(Body):
    type: Literal["enabled", "adaptive", "disabled"] = Field(
        description="`enabled` or `adaptive`: return reasoning."
    )
    budget_tokens: int | None = Field(None, ge=0, description="Accepted and ignored.")


class CountRequest(CachedRequest):
    """The fields that determine the prompt."""

    messages: Annotated[Many[Turn], Field(max_length=MAX_MESSAGES)] = Field(
        min_length=1,
        description="The turns so far. If the last one is the assistant's, the answer continues it.",
    )
    system: Utf8 | Texts | None = Field(None, description="The system prompt.")
    tools: Annotated[Many[CustomTool], Field(max_length=MAX_TOOLS)] | None = Field(
        None, description="Functions that the model may call."
    )
    tool_choice: ToolChoice | None = Field(None, description="Whether the model may or must call a tool.")
    thinking: Thinking | None = Field(
        None, description="Whether reasoning is returned, as a `thinking` block."
    )
    cache_control: CacheControl | None = Field(None, description="A breakpoint at the end of the last block.")

    def chat(self) -> tuple[list[Json], list[Json], list[Breakpoint]]:
        """Messages and tools in the format of chat templates, and the breakpoints. Raises BadRequest for too
        many breakpoints."""
        turns = Turns()
        tools = self.tools or []
        marks = [tool.ttl_seconds for tool in tools if tool.ttl_seconds is not None]
        if self.system:
            SystemTurn(role="system", content=self.system).add_to(turns)
        turns_left = list(self.messages)
        if not self.system and turns_left[0].role == "system":
            turns_left.pop(0).add_to(turns)
        # Tools are always kept together, since templates write all of them at one place.
        turns.add_breakpoint(max(marks, default=None))
        for turn in turns_left:
            turn.add_to(turns)
        if self.cache_control:
            turns.add_breakpoint(self.cache_control.seconds)
        n_breakpoints = len(turns.breakpoints) + len(marks[1:])
        if n_breakpoints > MAX_BREAKPOINTS:
            message = f"{n_breakpoints} blocks have cache_control; {MAX_BREAKPOINTS} is the most."
            raise BadRequest(message, param="cache_control")
        return turns.messages, [tool.function() for tool in tools], turns.breakpoints


class MessagesRequest(CountRequest):
    max_tokens: int = Field(
        ge=0,
        description="Maximum tokens of the answer; 0: only compute the prompt and store its breakpoints.",
    )
    stop_sequences: list[StopString] | None = Field(
        None, max_length=MOST_STOPS, description="Texts that end the answer; they are not included in it."
    )
    stream: bool | None = Field(False, description="Send the answer as server-sent events.")
    temperature: float | None = Field(None, ge=0, le=1, description="0: greedy sampling.")
    top_p: float | None = Field(None, ge=0, le=1, description="As in chat completions.")
    top_k: int | None = Field(None, ge=0, lt=1 << 31, description="As in chat completions.")
    output_config: OutputConfig | None = Field(None, description="Options for the answer.")
    cache_prompt: bool = Field(
        True, description="False: evaluate every prompt token; use no state of caches or slots."
    )
    explain_cache: bool = Field(
        False, description="Return `cache_explanation`: why the request hit or missed a cache."
    )

    def options(
        self, breakpoints: list[Breakpoint], caches: tuple[str, ...] | None, grammar: AnswerGrammar | None
    ) -> Options:
        """Raises BadRequest for a parameter that can't be honoured."""
        names = ("temperature", "top_p", "top_k")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return Options(
            max_tokens=self.max_tokens,
            sampling=Sampling(**given),
            stop=self.stop_sequences or [],
            use_cache=caches,
            reuse=self.cache_prompt,
            explain=self.explain_cache,
            grammar=grammar,
            given=given_parameters(self),
            breakpoints=breakpoints,
            calling=self.tool_choice.calling() if self.tool_choice else Calling(),
            # The start of a stream tells how much of the prompt is reused.
            progress=bool(self.stream),
        )

    def answer_grammar(self) -> AnswerGrammar | None:
        """The grammar of the requested format, if any. Raises BadRequest."""
        form = self.output_config and self.output_config.format
        return AnswerGrammar(json_grammar(form.schema_, "output_config"), "output_config") if form else None

    @property
    def shows_reasoning(self) -> bool:
        return self.thinking is not None and self.thinking.type != "disabled"
