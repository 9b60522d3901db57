"""Request bodies of chat and text completions."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, TypeVar

from pydantic import Field

from headstart.api.fields.generation import MOST_ANSWERS, GenerationRequest, Messages
from headstart.api.fields.tools import (
    ReasoningFormat,
    TemplateVariables,
    ToolChoice,
    Tools,
    calling,
)
from headstart.api.fields.values import LegacyLogprobs, Many, TokenId, TopLogprobs, Utf8
from headstart.errors import BadRequest
from headstart.service.interface.options import AnswerGrammar, Keep, Options
from headstart.service.interface.text import Text

COMPLETION_MAX_TOKENS = 16
MOST_PROMPTS = 128
T = TypeVar("T")
Prompts = Annotated[Many[T], Field(max_length=MOST_PROMPTS)]


class CompletionRequest(GenerationRequest):
    prompt: Utf8 | Prompts[Utf8] | Many[TokenId] | Prompts[Many[TokenId]] = Field(
        description="A text or its token ids, or a list of either, each with its own choices."
    )
    suffix: Utf8 | None = Field(
        None, description="The text after the answer, for models that can fill a gap."
    )
    echo: bool | None = Field(None, description="Begin each answer with the prompt as it was sent.")
    logprobs: LegacyLogprobs = Field(
        None, description="Return log-probabilities of each token and of this many likeliest tokens."
    )
    best_of: int | None = Field(
        None,
        ge=1,
        le=MOST_ANSWERS,
        description="1 or the same as `n`: the server does not choose among answers.",
    )

    def options(
        self, max_tokens: int | None, caches: tuple[str, ...] | None, grammar: AnswerGrammar | None
    ) -> Options:
        if self.best_of not in (None, 1, self.n):
            raise BadRequest(
                f"best_of = {self.best_of} is not supported by this server: ask for n answers and choose.",
                param="best_of",
            )
        if self.echo and self.logprobs is not None:
            raise BadRequest(
                "The prompt's tokens have no logprobs: leave echo out, or logprobs.", param="echo"
            )
        return super().options(max_tokens, caches, grammar)

    @property
    def n_logprobs(self) -> int | None:
        return self.logprobs

    def texts(self, caches: tuple[str, ...] | None) -> list[Text]:
        """The prompts. Raises BadRequest for none, too many, or an empty one without caches."""
        texts = [_text(prompt, self.suffix) for prompt in self._prompts()]
        if len(texts) > MOST_PROMPTS:
            raise BadRequest(f"{len(texts)} prompts; {MOST_PROMPTS} is the most.", param="prompt")
        if not texts or (caches is None and any(text.is_empty for text in texts)):
            raise BadRequest("The prompt is empty.", param="prompt")
        return texts

    def _prompts(self) -> list[str | list[int]]:
        prompt: Any = self.prompt
        is_one = isinstance(prompt, str) or (prompt and isinstance(prompt[0], int))
        return [prompt] if is_one else list(prompt)


def _text(prompt: str | list[int], suffix: str | None) -> Text:
    return Text(prompt, suffix=suffix or "") if isinstance(prompt, str) else Text("", prompt, suffix or "")


class ChatRequest(GenerationRequest):
    messages: Messages = Field(
        min_length=1,
        description="The chat so far. If the last message is the assistant's, the answer continues it.",
    )
    tools: Tools | None = Field(None, description="Functions that the model may call.")
    tool_choice: ToolChoice | None = Field(
        None, description="Whether the model may or must call tools: none, auto, required, or one function."
    )
    parallel_tool_calls: bool | None = Field(None, description="False: at most one call.")
    reasoning_format: ReasoningFormat | None = Field(
        None, description="none: leave reasoning in the answer's text."
    )
    chat_template_kwargs: TemplateVariables | None = Field(
        None, description="More variables for the chat template, such as `enable_thinking`."
    )
    max_completion_tokens: int | None = Field(None, ge=0, description="Overrides `max_tokens`.")
    logprobs: bool | None = Field(None, description="Return the log-probability of each token.")
    top_logprobs: TopLogprobs | None = Field(
        None, description="With `logprobs`: also return this many of the likeliest tokens."
    )
    continue_final_message: bool | None = Field(
        None,
        description="Whether the answer continues the last message. Refused if it contradicts `messages`.",
    )
    add_generation_prompt: bool | None = Field(
        None, description="False: the answer continues the last message, which must be the assistant's."
    )
    save_as: Utf8 | None = Field(None, description="Save the chat with its answer as a cache of this name.")
    allow_overwrite: bool | None = Field(
        None, description="Whether `save_as` may replace a cache. Default: only a conversation."
    )

    def options(
        self, max_tokens: int | None, caches: tuple[str, ...] | None, grammar: AnswerGrammar | None
    ) -> Options:
        self._check_end()
        return replace(
            super().options(max_tokens, caches, grammar),
            keep=None if self.save_as is None else Keep(self.save_as, self.allow_overwrite),
            calling=calling(self.tool_choice, self.parallel_tool_calls, self.reasoning_format),
            variables=self.chat_template_kwargs or {},
        )

    def _check_end(self) -> None:
        """Raises BadRequest if these parameters contradict the end of the messages."""
        last = self.messages[-1]
        continues = last.role == "assistant" and not last.tool_calls
        if self.continue_final_message not in (None, continues):
            end = "the user's" if continues else "the assistant's"
            given_parameters = str(self.continue_final_message).lower()
            raise BadRequest(
                f"continue_final_message = {given_parameters} needs a last message of {end}.",
                param="continue_final_message",
            )
        if self.add_generation_prompt is False and not continues:
            raise BadRequest(
                "add_generation_prompt = false needs a last message of the assistant's.",
                param="add_generation_prompt",
            )

    @property
    def n_logprobs(self) -> int | None:
        """Raises BadRequest for `top_logprobs` without `logprobs`."""
        if self.top_logprobs and not self.logprobs:
            raise BadRequest('top_logprobs needs "logprobs": true.', param="top_logprobs")
        return self.top_logprobs or 0 if self.logprobs else None
