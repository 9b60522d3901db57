"""Sockets in the file system, where tests want a file that is none."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def make_socket(path: Path) -> None:
    """Creates a socket. Their addresses are short, so it gets its name afterwards."""
    here = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(f"/proc/self/fd/{here}/{path.name[-20:]}")
    finally:
        os.close(here)
    path.with_name(path.name[-20:]).rename(path)
