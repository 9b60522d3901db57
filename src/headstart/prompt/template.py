"""Chat messages to one text, by the model's own Jinja template, in a sandbox: templates come with model files
and are not to be trusted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from headstart.errors import BadRequest, StartupError

Message = Mapping[str, Any]

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
BUILT_IN = {"chatml": CHATML, "fold": FOLD, "nosystem": NO_SYSTEM}


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
        try:
            self.compiled = _environment().from_string(self.source)
        except TemplateError as error:
            raise StartupError(f"The model's chat template is not valid Jinja: {error}") from error

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt up to where the assistant's answer begins. System messages that the template refuses
        are folded into the user message that follows. Raises BadRequest with the template's own words."""
        try:
            return self._render(messages)
        except BadRequest:
            folded = fold_system(messages)
            if folded == list(messages):
                raise
            return self._render(folded)

    def _render(self, messages: Sequence[Message]) -> str:
        # A template may stumble over what it did not expect in as many ways as any other code.
        try:
            return self.compiled.render(messages=messages, add_generation_prompt=True, **self.specials)
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            reason = f"The model's chat template refuses these messages: {error}"
            raise BadRequest(reason, param="messages") from error


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
