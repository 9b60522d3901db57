"""Chat messages to one text, by the model's own Jinja template, in a sandbox: templates come with model files
and are not to be trusted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from headstart.errors import BadRequest, StartupError
from headstart.prompt.calls.default import written_out
from headstart.prompt.calls.dialects import HERMES, dialect_of
from headstart.prompt.reasoning import CLOSE

Message = Mapping[str, Any]
# A function that the model may call, as OpenAI's API describes it.
Tool = Mapping[str, Any]
# What else a template is told, such as enable_thinking.
Variables = Mapping[str, Any]
NO_VARIABLES: Variables = MappingProxyType({})

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Gemma does: the system text opens the first user turn.
FOLD = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set opening = messages[0]['content'] + '\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set opening = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('only the first message may be a system one') }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if loop.first %}{{ opening }}{% endif %}"
    "{{ message['content'] | trim }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Mistral's first ones do: no system role at all.
NO_SYSTEM = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Hermes and Qwen do: tools are listed in the system message, calls and their results are tagged.
TOOLS = (
    "{% set first = messages[0] %}{% set has_system = first['role'] == 'system' %}"
    "{% if has_system or tools %}{{ '<|im_start|>system\n' }}"
    "{% if has_system %}{{ first['content'] }}{% endif %}"
    "{% if tools %}{{ '\n\n# Tools\n\n<tools>' }}"
    "{% for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}{{ '\n</tools>' }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for message in (messages[1:] if has_system else messages) %}"
    "{% if message['role'] == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + message['content'] }}"
    "{{ '\n</tool_response><|im_end|>\n' }}{% else %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ '\n<tool_call>\n' + (call['function'] | tojson) + '\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Stands for the text of a message that is continued; what follows it is cut off.
MARK = "continued-from-here-5b1f0c"
BUILT_IN = {"chatml": CHATML, "fold": FOLD, "nosystem": NO_SYSTEM, "tools": TOOLS}


def _raise(message: str) -> None:
    raise TemplateError(message)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    return environment


class ChatTemplate:
    """`source` is Jinja, or the name of a built-in template; None means ChatML. Raises StartupError for what
    is neither."""

    def __init__(self, source: str | None, bos_text: str, eos_text: str) -> None:
        self.source = BUILT_IN.get(source or "chatml", source or "")
        self.specials = {"bos_token": bos_text, "eos_token": eos_text}
        environment = _environment()
        try:
            self.compiled = environment.from_string(self.source)
            names = environment.parse(self.source).find_all(nodes.Name)
        except TemplateError as error:
            raise StartupError(f"The model's chat template is not valid Jinja: {error}") from error
        self.has_tools = any(name.name == "tools" for name in names)
        self.dialect = dialect_of(self.source) if self.has_tools else HERMES
        self.reasons = CLOSE in self.source

    def render(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), variables: Variables = NO_VARIABLES
    ) -> str:
        """The prompt up to where the assistant's answer begins, or goes on: a last message of the assistant's
        that calls no tools is left open. What the template has no place for is written as text: tools, calls
        and their results, and system messages that it refuses, which are folded into the user message that
        follows. Raises BadRequest with the template's own words, or for `variables` that are not the
        request's to set."""
        begins = not is_open(messages)
        own = {"tools": list(tools) or None, "add_generation_prompt": begins, **self.specials}
        if taken := variables.keys() & {"messages", *own}:
            reason = f"{min(taken)!r} is not to be set by chat_template_kwargs."
            raise BadRequest(reason, param="chat_template_kwargs")
        if not self.has_tools:
            messages = self._written_out(messages, tools)
        try:
            return self._render(messages, {**variables, **own})
        except BadRequest:
            folded = fold_system(messages)
            if folded == list(messages):
                raise
            return self._render(folded, {**variables, **own})

    def _written_out(self, messages: Sequence[Message], tools: Sequence[Tool]) -> Sequence[Message]:
        try:
            return written_out(messages, tools)
        except RecursionError as error:
            raise BadRequest("Tools and calls are nested too deeply.", param="messages") from error

    def _render(self, messages: Sequence[Message], variables: Variables) -> str:
        if variables["add_generation_prompt"]:
            return self._rendered(messages, variables)
        # Templates trim and take apart what a message says; what is continued stays as it is.
        *before, last = messages
        marked = [*before, {**last, "content": MARK}]
        text, mark, _ = self._rendered(marked, variables).rpartition(MARK)
        if not mark:
            raise BadRequest(
                "The model's chat template can't end with a message of the assistant's: let one of the "
                "user's be last.",
                param="messages",
            )
        return text + str(last["content"])

    def _rendered(self, messages: Sequence[Message], variables: Variables) -> str:
        # A template may stumble over what it did not expect in as many ways as any other code.
        try:
            return self.compiled.render({**variables, "messages": messages})
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
            reason = f"The model's chat template refuses these messages: {error}"
            raise BadRequest(reason, param="messages") from error


def is_open(messages: Sequence[Message]) -> bool:
    """Whether the answer continues the last message."""
    last = messages[-1] if messages else {"role": ""}
    return last["role"] == "assistant" and not last.get("tool_calls")


def fold_system(messages: Sequence[Message]) -> list[Message]:
    """Moves each system text to the head of the next user message, two line breaks between them."""
    folded: list[Message] = []
    pending = ""
    for message in messages:
        if message["role"] == "system":
            pending += message["content"] + "\n\n"
        elif message["role"] == "user":
            folded.append({**message, "content": pending + message["content"]})
            pending = ""
        else:
            folded.append(message)
    return folded
