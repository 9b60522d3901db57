"""Runs a measurement in a process of its own."""

from __future__ import annotations

import selectors
import socket
import subprocess
from collections.abc import Mapping

import msgspec

from headstart.engine.model import ModelError
from headstart.machine import module_command
from headstart.numerics import Tuning
from headstart.protocol import EngineSettings


def measured(
    settings: EngineSettings, channel: socket.socket | None, env: Mapping[str, str] | None
) -> Tuning:
    """The result of `tuning.measure`. The process's memory is certainly free afterwards, and if it needs too
    much or crashes, the model can still run. Parameters and errors as in `tuning.resolve.measure_apart`."""
    process = subprocess.Popen(
        module_command("headstart.engine.tuning.measure", msgspec.json.encode(settings).decode()),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=env,
    )
    assert process.stdout
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if channel is not None:
                # The server sends nothing before the worker is ready: readable means closed.
                selector.register(channel, selectors.EVENT_READ)
            if all(key.fileobj is not process.stdout for key, _ in selector.select()):
                raise EOFError
        answer = process.stdout.read()
        status = process.wait()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    if status != 0:
        raise ModelError(f"the measuring process ended with status {status}")
    try:
        return msgspec.json.decode(answer, type=Tuning)
    except msgspec.MsgspecError as error:
        raise ModelError(f"the measuring process returned an invalid tuning: {error}") from error
