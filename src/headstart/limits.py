"""How much is taken of what others say, wherever it comes from."""

from __future__ import annotations

# Parsers, templates and grammars recurse; the least of them gives up at some 200 levels.
MAX_DEPTH = 64
MAX_MESSAGES = 10_000
MAX_TOOLS = 1_000
