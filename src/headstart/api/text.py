"""Text in request bodies, and lists that may be long."""

from __future__ import annotations

from headstart.contents import Many, Utf8

__all__ = ["Many", "Utf8"]
