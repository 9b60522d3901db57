"""Text in request bodies."""

from __future__ import annotations

from headstart.contents import Utf8

__all__ = ["Utf8"]
