"""Chat messages to one text, with the model's own Jinja template. Templates come with model files and are not
trusted: they run in a sandbox, in a process with limited memory and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from jinja2 import nodes

from headstart.errors import BadRequest, StartupError
from headstart.prompt.chat import MOST_CHARACTERS, NO_VARIABLES, Message, Tool, Variables, is_open
from headstart.prompt.reasoning import CLOSE
from headstart.prompt.sandbox import OwnWords, Sandbox
from headstart.prompt.tool_calls.formats import HERMES, call_format_of
from headstart.prompt.tool_calls.plain_text import written_out

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As in Gemma: the system text opens the first user turn.
FOLD_SYSTEM = (
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
# As in the first Mistral models: no system role at all.
NO_SYSTEM = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As in Hermes and Qwen: tools are listed in the system message, calls and their results are tagged.
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
# Placeholder for the text of a message that is continued; the prompt is cut at it.
MARKER = "continued-from-here-5b1f0c"
BUILT_IN = {"chatml": CHATML, "fold": FOLD_SYSTEM, "nosystem": NO_SYSTEM, "tools": TOOLS}


# Characters of an error's message, which may be the template's own.
MAX_ERROR_CHARS = 500
Limit = AbstractContextManager[object]
NO_LIMIT: Limit = nullcontext()
# A chat that every template must be able to render.
SIMPLEST_CHAT = [{"role": "user", "content": "Why?"}]


class OutOfTime(BaseException):
    """Raised in a template that has run for too long. Code called by it must not catch it."""


class TemplateFails(Exception):
    """The template fails, not because of the messages; the error's message says why."""


class ChatTemplate:
    """`source` is Jinja, or the name of a built-in template; None means ChatML. `limit` is entered while the
    template runs, and may raise OutOfTime. Raises StartupError for an invalid template."""

    def __init__(
        self,
        source: str | None,
        bos_text: str,
        eos_text: str,
        limit: Limit = NO_LIMIT,
    ) -> None:
        self.source = BUILT_IN.get(source or "chatml", source or "")
        self.specials = {"bos_token": bos_text, "eos_token": eos_text}
        self.limit = limit
        # The error with which even the plainest chat fails.
        self._fault: BaseException | None = None
        environment = Sandbox()
        try:
            self.compiled = environment.from_string(self.source)
            names = {name.name for name in environment.parse(self.source).find_all(nodes.Name)}
        except Exception as error:
            # Python's compiler also reports errors, for deep nesting or a bug in Jinja's output.
            raise StartupError(f"The model's chat template is not valid Jinja: {_words(error)}") from error
        self.has_tools = "tools" in names
        self.call_format = call_format_of(self.source) if self.has_tools else HERMES
        self.reasons = CLOSE in self.source

    def render(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), variables: Variables = NO_VARIABLES
    ) -> str:
        """The prompt up to the start of the assistant's answer, or its continuation: a last message of the
        assistant without tool calls is left open. Content that the template has no place for is written as
        text: tools, calls and their results; refused system messages are folded into the next user message.
        Raises BadRequest with the template's own words, or for `variables` that a request may not set;
        TemplateFails if the template is at fault, which is known after `check`."""
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
        # Templates trim and split message texts; a continued text must stay as it is.
        *before, last = messages
        marked = [*before, {**last, "content": MARKER}]
        text, marker, _ = self._rendered(marked, variables).rpartition(MARKER)
        if not marker:
            raise BadRequest(
                "The model's chat template can't end with a message of the assistant's: let one of the "
                "user's be last.",
                param="messages",
            )
        return text + str(last["content"])

    def check(self) -> None:
        """Checks whether the template can render the plainest chat. If it fails without a message of its own,
        its later failures count as faults of the template."""
        own = {"tools": None, "add_generation_prompt": True, **self.specials}
        try:
            self._written({**own, "messages": SIMPLEST_CHAT})
        except OwnWords:
            pass
        except (Exception, OutOfTime) as error:
            self._fault = error.with_traceback(None)

    def _rendered(self, messages: Sequence[Message], variables: Variables) -> str:
        if isinstance(self._fault, OutOfTime):
            raise TemplateFails(_words(self._fault))
        try:
            return self._written({**variables, "messages": messages})
        except (Exception, OutOfTime) as error:
            # A template may fail on unexpected input in as many ways as any other code.
            if self._fault and not isinstance(error, OwnWords):
                raise TemplateFails(_words(error)) from error
            reason = f"The model's chat template refuses these messages: {_words(error)}"
            raise BadRequest(reason, param="messages") from error

    def _written(self, context: Mapping[str, Any]) -> str:
        parts: list[str] = []
        n_characters = 0
        with self.limit:
            for part in self.compiled.generate(context):
                n_characters += len(part)
                if n_characters > MOST_CHARACTERS:
                    raise OverflowError(f"it writes more than {MOST_CHARACTERS} characters")
                parts.append(part)
        return "".join(parts)


def _words(error: BaseException) -> str:
    """An error's message, or its type if it has none."""
    words = str(error)[:MAX_ERROR_CHARS]
    return words if words and not isinstance(error, KeyError) else f"{type(error).__name__} {words}".strip()


def fold_system(messages: Sequence[Message]) -> list[Message]:
    """Moves each system text to the beginning of the next user message, separated by two line breaks."""
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
