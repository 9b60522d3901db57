"""Request fields for structured output: OpenAI's `response_format`, llama-server's `grammar` and vLLM's
`structured_outputs`."""

from __future__ import annotations

from collections.abc import Coroutine, Iterator
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from headstart.api.fields.values import Utf8
from headstart.api.sse import while_connected
from headstart.errors import BadRequest
from headstart.service.generation.grammars import (
    OBJECT,
    choice_grammar,
    json_grammar,
    lark_grammar,
    regex_grammar,
    written_grammar,
)
from headstart.service.interface.options import AnswerGrammar, Options

Schema = dict[str, Any]
T = TypeVar("T")
Written = Annotated[Utf8, StringConstraints(min_length=1, max_length=65536)]


class FormatField(BaseModel):
    model_config = ConfigDict(extra="allow", populate_by_name=True)


class JsonSchema(FormatField):
    name: Utf8 | None = Field(None, description="The schema's name. Accepted and ignored.")
    schema_: Schema = Field(alias="schema", description="The JSON schema that the answer must match.")
    strict: bool | None = Field(None, description="Ignored: the schema is always enforced.")


class ResponseFormat(FormatField):
    type: Literal["text", "json_object", "json_schema", "regex", "lark"] = Field(
        description="The answer's format; `text`: no constraint."
    )
    json_schema: JsonSchema | None = Field(None, description="The schema for type `json_schema`.")
    schema_: Schema | None = Field(None, alias="schema", description="A schema for type `json_object`.")
    regex: Written | None = Field(
        None, description="For type `regex`: the expression that the whole answer must match."
    )
    lark: Written | None = Field(None, description="For type `lark`: a grammar in llguidance's syntax.")

    @model_validator(mode="after")
    def _has_what_its_type_names(self) -> ResponseFormat:
        if self.type in ("json_schema", "regex", "lark") and getattr(self, self.type) is None:
            raise ValueError(f"{self.type} is missing")
        return self

    def grammars(self, param: str) -> Iterator[str]:
        if self.type == "json_object":
            yield json_grammar(self.schema_ or OBJECT, param)
        elif self.type == "json_schema" and self.json_schema:
            yield json_grammar(self.json_schema.schema_, param)
        elif self.type == "regex" and self.regex:
            yield regex_grammar(self.regex)
        elif self.type == "lark" and self.lark:
            yield lark_grammar(self.lark)


class StructuredOutputs(FormatField):
    json_: Schema | None = Field(None, alias="json", description="A JSON schema that the answer must match.")
    json_object: bool | None = Field(None, description="True: the answer is any JSON object.")
    regex: Written | None = Field(None, description="An expression that the whole answer must match.")
    choice: Annotated[list[Utf8], Field(min_length=1)] | None = Field(
        None, description="The answer is one of these texts."
    )
    grammar: Written | None = Field(None, description="A grammar in Lark or GBNF.")

    def grammars(self, param: str) -> Iterator[str]:
        if self.json_ is not None:
            yield json_grammar(self.json_, param)
        if self.json_object:
            yield json_grammar(OBJECT, param)
        if self.regex is not None:
            yield regex_grammar(self.regex)
        if self.choice is not None:
            yield choice_grammar(self.choice)
        if self.grammar is not None:
            yield written_grammar(self.grammar, param)


class StructuredRequest(BaseModel):
    response_format: ResponseFormat | None = Field(None, description="The answer's format.")
    written_grammar: Written | None = Field(
        None, alias="grammar", description="A grammar for the answer, in Lark or GBNF."
    )
    structured_outputs: StructuredOutputs | None = Field(
        None, description="The answer's format, with vLLM's field names."
    )

    @property
    def has_grammar(self) -> bool:
        forms = (self.response_format, self.written_grammar, self.structured_outputs)
        return any(form is not None for form in forms)

    def answer_grammar(self) -> AnswerGrammar | None:
        """The requested grammar, if any. Raises BadRequest for an invalid grammar, or for more than one."""
        found = list(self._answer_grammars())
        if len(found) > 1:
            raise BadRequest(
                "The answer can have only one format; leave the others out.", param=found[1].param
            )
        return found[0] if found else None

    def _answer_grammars(self) -> Iterator[AnswerGrammar]:
        if self.response_format is not None:
            for grammar in self.response_format.grammars("response_format"):
                yield AnswerGrammar(grammar, "response_format")
        if self.written_grammar is not None:
            yield AnswerGrammar(written_grammar(self.written_grammar, "grammar"), "grammar")
        if self.structured_outputs is not None:
            for grammar in self.structured_outputs.grammars("structured_outputs"):
                yield AnswerGrammar(grammar, "structured_outputs")


async def while_preparing(
    request: Request, options: Options, tools: object, preparing: Coroutine[Any, Any, T]
) -> T:
    """The result of `preparing`. Checking a grammar, also that of tools, can take long, so it is cancelled
    when the client disconnects."""
    checks = tools or options.grammar
    return await (while_connected(request, preparing) if checks else preparing)
