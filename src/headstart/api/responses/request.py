"""Request bodies of /v1/responses and their conversion to a chat."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints

from headstart.api.fields.generation import Body, SampledRequest, given_parameters
from headstart.api.fields.tools import JsonObject, Tool, ToolChoice, calling
from headstart.api.fields.values import Many, Utf8
from headstart.api.responses.items import Items
from headstart.errors import BadRequest
from headstart.limits import MAX_TOOLS
from headstart.service.generation.grammars import OBJECT, json_grammar
from headstart.service.interface.options import AnswerGrammar, Keep, Options

Json = dict[str, Any]
Key = Annotated[Utf8, StringConstraints(min_length=1, max_length=64)]
Value = Annotated[Utf8, StringConstraints(max_length=512)]

# Unsupported parameters, each with the values that have no effect and are accepted, and what to do instead.
REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "background": ((None, False), "leave it out and wait for the answer, or stream it"),
    "truncation": ((None, "disabled"), 'shorten the input, or say "disabled"'),
    "context_management": ((None, []), "shorten the input"),
    "conversation": ((None,), "use previous_response_id"),
    "moderation": ((None,), "leave it out"),
    "prompt": ((None,), "send the text as instructions or input"),
    "top_logprobs": ((None, 0), "leave it out"),
    "n": ((None, 1), "send a request for each answer"),
    "messages": ((None,), "send them as input"),
    "max_tokens": ((None,), "the parameter here is max_output_tokens"),
    "max_completion_tokens": ((None,), "the parameter here is max_output_tokens"),
    "response_format": ((None, {"type": "text"}), "the parameter here is text.format"),
    "logit_bias": ((None, {}), "leave it out"),
    "logprobs": ((None, False), "leave it out"),
    "modalities": ((None, ["text"]), "leave it out"),
    "save_as": ((None,), "store keeps a response under its id"),
}
LOGPROBS = "message.output_text.logprobs"


def _as_in_chats(value: Any) -> Any:
    """Converts the tool to the format of chats. Raises ValueError for a tool other than a function."""
    if not isinstance(value, dict):
        return value
    if value.get("type") != "function":
        raise ValueError('Tools are functions here: {"type": "function", "name": ...}; no others are there')
    fields = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {k: value[k] for k in fields if value.get(k) is not None}}


def _choice_as_in_chats(value: Any) -> Any:
    match value:
        case {"type": "function", "name": str(name)}:
            return {"type": "function", "function": {"name": name}}
    return value


ToolAsInChats = Annotated[Tool, BeforeValidator(_as_in_chats)]


class TextFormat(Body):
    type: Literal["text", "json_schema", "json_object"] = Field(
        "text", description="The type; `text`: no constraint."
    )
    schema_: JsonObject | None = Field(
        None, alias="schema", description="For type `json_schema`: the schema that the answer must match."
    )


class TextOptions(Body):
    format: TextFormat | None = Field(None, description="The format of the answer's text.")
    verbosity: Utf8 | None = Field(None, description="Accepted and ignored.")


class ReasoningOptions(Body):
    effort: Utf8 | None = Field(None, description="Accepted and ignored.")
    summary: Utf8 | None = Field(None, description="Accepted and ignored.")


class ResponseRequest(SampledRequest):
    input: Utf8 | Items = Field([], description="A user message as text, or a list of items.")
    instructions: Utf8 | None = Field(
        None, description="The system message; not carried over to later responses."
    )
    previous_response_id: Utf8 | None = Field(None, description="The id of the stored response to continue.")
    store: bool | None = Field(
        True, description="Whether to store the response, so that others can continue it."
    )
    max_output_tokens: int | None = Field(
        None, ge=0, lt=1 << 53, description="Maximum number of tokens of the answer."
    )
    stream: bool | None = Field(False, description="Send the answer as named server-sent events.")
    tools: Annotated[Many[ToolAsInChats], Field(max_length=MAX_TOOLS)] | None = Field(
        None, description="Functions that the model may call."
    )
    tool_choice: Annotated[ToolChoice, BeforeValidator(_choice_as_in_chats)] | None = Field(
        None,
        description="Whether the model may or must call functions: none, auto, required, or one function.",
    )
    parallel_tool_calls: bool | None = Field(None, description="False: at most one call.")
    text: TextOptions | None = Field(None, description="Options for the answer's text.")
    reasoning: ReasoningOptions | None = Field(None, description="Accepted and ignored.")
    include: Many[Utf8] | None = Field(
        None, description="Accepted and ignored, except `message.output_text.logprobs`, which is refused."
    )
    metadata: Annotated[dict[Key, Value], Field(max_length=16)] | None = Field(
        None, description="Echoed in the response."
    )
    user: Utf8 | None = Field(None, description="Echoed in the response.")
    prompt_cache_key: Utf8 | None = Field(None, description="Echoed in the response.")

    def input_messages(self) -> list[Json]:
        """The input as messages of a chat. Raises BadRequest if it is empty and continues no response."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        chat: list[Json] = []
        for item in self.input:
            item.add_to(chat)
        if not chat and self.previous_response_id is None:
            raise BadRequest("The input is empty: send a text, or a list with a message.", param="input")
        return chat

    def options(
        self, caches: tuple[str, ...] | None, grammar: AnswerGrammar | None, keep: Keep | None
    ) -> Options:
        """Raises BadRequest for a parameter that can't be honoured."""
        self._check_supported()
        return Options(
            max_tokens=self.max_output_tokens,
            sampling=self.sampling,
            stop=self.stops,
            use_cache=caches,
            reuse=self.cache_prompt,
            to_disk=self.store is not False,
            explain=self.explain_cache,
            keep=keep,
            count_reasoning=True,
            grammar=grammar,
            given=given_parameters(self),
            calling=calling(self.tool_choice, self.parallel_tool_calls, None),
        )

    def answer_grammar(self) -> AnswerGrammar | None:
        """The grammar of the requested format, if any. Raises BadRequest."""
        form = self.text and self.text.format
        if not form or form.type == "text":
            return None
        if form.type == "json_schema" and form.schema_ is None:
            raise BadRequest("text.format of type json_schema needs a schema.", param="text.format")
        schema = form.schema_ if form.type == "json_schema" and form.schema_ else OBJECT
        return AnswerGrammar(json_grammar(schema, "text.format"), "text.format")

    def _check_supported(self) -> None:
        extra: Json = self.model_extra or {}
        for name, (harmless, instead) in REFUSED.items():
            if name in extra and extra[name] not in harmless:
                raise BadRequest(f"{name} is not supported for responses: {instead}.", param=name)
        if LOGPROBS in (self.include or []):
            raise BadRequest(f"{LOGPROBS} is not supported by this server; leave it out.", param="include")


def echoed_fields(body: ResponseRequest, options: Options) -> Json:
    """Fields of the request that the response echoes."""
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": body.model,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None},
        "store": body.store is not False,
        "temperature": options.sampling.temperature,
        "text": {"format": _form(body)},
        "tool_choice": _choice(body.tool_choice),
        "tools": [_flat(tool["function"]) for tool in body.tools or []],
        "top_logprobs": 0,
        "top_p": options.sampling.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


def _form(body: ResponseRequest) -> Json:
    form = body.text.format if body.text else None
    if form is None:
        return {"type": "text"}
    return form.model_dump(by_alias=True, exclude_none=True)


def _choice(choice: Any) -> Any:
    return {"type": "function", **choice["function"]} if isinstance(choice, dict) else choice or "auto"


def _flat(function: Json) -> Json:
    missing = {"description": None, "parameters": None, "strict": None}
    return {"type": "function", **missing, **function}
