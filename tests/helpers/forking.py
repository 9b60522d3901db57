"""A process that forks others on request, over a socket. A new process isn't the asking one's child: a parent
of its own waits for it and writes its exit status to a pipe."""

from __future__ import annotations

import json
import os
import signal
import socket
from typing import Any

LARGEST_REQUEST = 1 << 20


def fork(channel: socket.socket, request: dict[str, Any], handles: list[int]) -> tuple[int, int]:
    """Asks for a process with this request and these files; its process id, and the pipe for its status."""
    reader, writer = os.pipe()
    try:
        socket.send_fds(channel, [json.dumps(request).encode() + b"\n"], [writer, *handles])
        return int(channel.recv(32)), reader
    finally:
        os.close(writer)


def serve(channel: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Forks until the end of the socket, which ends this process. Returns in each new process, with its
    request and files."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, handles, _, _ = socket.recv_fds(channel, LARGEST_REQUEST, 3)
        if not message:
            os._exit(0)
        while not message.endswith(b"\n"):
            message += channel.recv(LARGEST_REQUEST)
        if not os.fork():
            _become_parent(channel, handles[0])
            signal.signal(signal.SIGINT, signal.default_int_handler)
            return json.loads(message), handles[1:]
        for handle in handles:
            os.close(handle)


def _become_parent(channel: socket.socket, status: int) -> None:
    """Returns in a child. Its parent tells its process id, waits for its end, tells its status, and ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if not (child := os.fork()):
        channel.close()
        os.close(status)
        return
    # Like Popen's children, the process is interrupted with its group; this one only waits for it.
    channel.sendall(str(child).encode())
    channel.close()
    _, ended = os.waitpid(child, 0)
    os.write(status, str(os.waitstatus_to_exitcode(ended)).encode())
    os._exit(0)
