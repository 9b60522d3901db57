"""What a cache is made of, as requests say it."""

from __future__ import annotations

from pydantic import ConfigDict, Field

from headstart.api.schemas import Body, Messages
from headstart.api.tools import Tools
from headstart.caches.entry import FORMS, Content, Form
from headstart.contents import Utf8
from headstart.errors import BadRequest


class CacheRequest(Body):
    model_config = ConfigDict(extra="allow", populate_by_name=True)

    cache_name: Utf8 = Field(description="What requests name it by.")
    prompt: Utf8 | None = Field(
        None, description="The system prompt in chats; the leading text in completions."
    )
    messages: Messages | None = Field(
        None, min_length=1, description="Instead of a prompt: what chats begin with."
    )
    tools: Tools | None = Field(None, description="With messages: functions the model may call.")
    forms: list[Form] = Field(
        list(FORMS), alias="for", min_length=1, description="What the cache is for: chat, completion or both."
    )
    allow_overwrite: bool = Field(True, description="False: 409 when there is one of this name.")
    stream: bool = Field(False, description="Report progress as server-sent events.")

    def content(self) -> Content:
        """Raises BadRequest unless there is a prompt or there are messages."""
        if self.messages is None:
            if self.prompt is None:
                raise BadRequest("A cache needs a prompt or messages.", param="prompt")
            if self.tools:
                raise BadRequest(
                    "tools go with messages; send the prompt as the first of them.", param="tools"
                )
            return Content(self.prompt)
        if self.prompt is not None:
            raise BadRequest("A cache has either a prompt or messages.", param="messages")
        return Content(messages=[message.plain() for message in self.messages], tools=self.tools or [])

    def wanted(self) -> tuple[Form, ...]:
        """The forms asked for. Raises BadRequest for those that messages don't have."""
        if self.messages is None:
            return tuple(dict.fromkeys(self.forms))
        if "forms" in self.model_fields_set and "completion" in self.forms:
            raise BadRequest(
                "Messages are for chats only: leave completion out, or send a prompt.", param="for"
            )
        return ("chat",)
