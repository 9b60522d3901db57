"""The worker process of one model: `python -m headstart.engine.worker FD PATH`.

It loads no model until it receives its settings, which the server sends once the prompt process has read the
model's file. It ends when its socket closes, however the server ended.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import socket
import sys
from contextlib import suppress
from functools import partial

from headstart.channel import Frames, frame
from headstart.engine.kinds import engine_kind
from headstart.engine.model import ModelError, TooLarge
from headstart.engine.tuning.resolve import find_tuning, resolved
from headstart.engine.worker_engine import WorkerEngine
from headstart.protocol import Begin, Command, EngineSettings, LoadFailed, Ready, Step, WorkerMessage

# The server kills a worker 10 seconds after it has closed the socket.
CLOSING_SECONDS = 8.0


class Worker:
    def __init__(self, channel: socket.socket) -> None:
        """Waits for the settings and loads the model. Raises ModelError; EOFError if the channel is closed
        meanwhile."""
        self.channel = channel
        self.frames: Frames[Command] = Frames(Command)
        settings = self._settings()
        self.selector = selectors.DefaultSelector()
        self.selector.register(channel, selectors.EVENT_READ, self._receive)
        wake_reader, wake_writer = os.pipe()
        self.selector.register(wake_reader, selectors.EVENT_READ, lambda: os.read(wake_reader, 4096))
        wake = partial(os.write, wake_writer, b"w")
        tuning = find_tuning(settings, channel)
        kind = engine_kind(settings.path)
        self.engine: WorkerEngine = kind.open(resolved(settings, tuning), wake)
        self.send(Ready(self.engine.info, tuning))

    def _settings(self) -> EngineSettings:
        while True:
            for command in self.frames.feed(self._received()):
                # The server sends nothing else before Ready.
                assert isinstance(command, Begin)
                return command.settings

    def _received(self) -> bytes:
        data = self.channel.recv(1 << 20)
        if not data:
            raise EOFError
        return data

    def send(self, message: WorkerMessage) -> None:
        self.channel.sendall(frame(message))

    def run(self) -> None:
        """Steps while there is work, sleeps while there is none, returns when the server closes the
        socket."""
        try:
            while True:
                for key, _ in self.selector.select(0 if self.engine.busy else self.engine.pause):
                    key.data()
                if events := self.engine.step():
                    self.send(Step(events))
                if report := self.engine.report():
                    self.send(report)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return

    def _receive(self) -> None:
        for command in self.frames.feed(self._received()):
            self.engine.handle(command)


def main() -> None:
    # The server decides when to stop: a Ctrl-C reaches the whole process group, but requests are drained
    # first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level=os.environ.get("HEADSTART_LOG_LEVEL", "WARNING").upper())
    channel = socket.socket(fileno=int(sys.argv[1]))
    with suppress(Exception):
        # Loading fails in the same way, and reports the error.
        engine_kind(sys.argv[2]).prepare()
    try:
        worker = Worker(channel)
    except ModelError as error:
        with suppress(OSError):
            channel.sendall(frame(LoadFailed(str(error), isinstance(error, TooLarge))))
        return
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    worker.run()
    worker.engine.flush(CLOSING_SECONDS)
    # Skips native destructors: they have nothing to save, and crash now and then.
    os._exit(0)


if __name__ == "__main__":
    main()
