"""The prompt process of one model: `python -m headstart.prompt.process.worker FD`.

It runs code that model files control and that must not run in the server: the tokenizer, which is native
code, and the chat template. It answers one request after another until its socket is closed.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import suppress

import msgspec

from headstart.channel import HEADER, frame
from headstart.errors import BadRequest, StartupError
from headstart.prompt.load import load_prompts
from headstart.prompt.process import limits
from headstart.prompt.process.protocol import (
    ChatPrefix,
    ChatPrompt,
    Facts,
    Load,
    Plain,
    Refused,
    Render,
    Rendered,
    Reply,
    Request,
    TextPrefix,
    TextPrompt,
    Tokenisable,
    Tokenise,
    Tokens,
)
from headstart.prompt.prompts import Prompts
from headstart.prompt.template import TemplateFails

log = logging.getLogger(__name__)


class PromptProcess:
    prompts: Prompts

    def __init__(self) -> None:
        self.template_time = limits.TemplateTime()
        self.decoder = msgspec.json.Decoder(Request)

    def answer(self, data: bytes) -> Reply:
        """Errors of the request are returned as Refused; errors in native code end the process."""
        limits.end_after(limits.REQUEST_SECONDS + limits.SECONDS_PER_BYTE * len(data))
        self.template_time.renew()
        try:
            return self._reply(self.decoder.decode(data))
        except BadRequest as error:
            return Refused(error.message, error.param)
        except TemplateFails as error:
            return Refused(f"its chat template fails, whatever the messages: {error}", always=True)
        except (RecursionError, MemoryError) as error:
            return Refused(f"The prompt is too large or nested too deeply: {error or 'no memory'}")
        finally:
            limits.end_after(0)

    def _reply(self, request: Request) -> Reply:
        match request:
            case Load():
                limits.end_after(limits.LOAD_SECONDS)
                return self._load(request)
            case Tokenise(items=items, can_cut=can_cut, prefix=prefix):
                self.prompts.can_cut = can_cut
                lists = [self._tokens(each) for each in items]
                return Tokens(lists, self._tokens_if_any(prefix) if prefix else None)
            case Render(messages=messages, tools=tools):
                return Rendered(self.prompts.template.render(messages, tools))

    def _load(self, load: Load) -> Facts | Refused:
        try:
            self.prompts = load_prompts(load.path, load.template, self.template_time)
            facts = self.prompts.facts()
            limits.end_after(limits.REQUEST_SECONDS)
            self.prompts.template.check()
            return facts
        except StartupError as error:
            return Refused(str(error), always=True)
        except Exception as error:
            # A file may be invalid in any way.
            log.warning("%s can't be read", load.path, exc_info=True)
            return Refused(f"{load.path} can't be read: {type(error).__name__}: {error}", always=True)

    def _tokens_if_any(self, prefix: ChatPrefix | TextPrefix) -> list[int] | None:
        try:
            return self._tokens(prefix)
        except BadRequest:
            return None

    def _tokens(self, item: Tokenisable) -> list[int]:
        prompts = self.prompts
        match item:
            case ChatPrompt(messages=messages, tools=tools, variables=variables):
                return prompts.chat(messages, tools, variables)
            case ChatPrefix(messages=messages, tools=tools):
                return prompts.chat_opening(messages, tools)
            case TextPrompt(text=text):
                return prompts.text(text)
            case TextPrefix(text=text):
                return prompts.text_opening(text)
            case Plain(text=text, first=first, special=special):
                return prompts.tokenizer.encode(text, first, parse_special=special)


def received(channel: socket.socket) -> Iterator[bytes]:
    """The bodies of requests, until the server closes the socket."""
    with channel.makefile("rb") as stream:
        while len(header := stream.read(HEADER.size)) == HEADER.size:
            (size,) = struct.unpack("<I", header)
            if len(body := stream.read(size)) < size:
                return
            yield body


def main() -> None:
    # The server decides when to stop: Ctrl-C reaches the whole process group, but requests are drained first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level=os.environ.get("HEADSTART_LOG_LEVEL", "WARNING").upper())
    limits.limit_memory()
    channel = socket.socket(fileno=int(sys.argv[1]))
    process = PromptProcess()
    with suppress(BrokenPipeError, ConnectionResetError):
        for body in received(channel):
            channel.sendall(frame(process.answer(body)))
    # Native destructors have nothing left to save, and sometimes crash.
    os._exit(0)


if __name__ == "__main__":
    main()
