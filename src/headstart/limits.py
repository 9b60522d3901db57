"""How much is taken of what others say, wherever it comes from.

An agent's request of 100 KB with 30 tools has some 900 objects and lists, 4,000 strings and 8 levels.
"""

from __future__ import annotations

# Parsers, templates and grammars recurse; the least of them gives up at some 200 levels.
MAX_DEPTH = 64
MAX_CONTAINERS = 50_000
MAX_STRINGS = 100_000
# Token ids are values, too. OpenAI takes 300,000 of them in one request for embeddings.
MAX_VALUES = 320_000

MAX_MESSAGES = 10_000
MAX_TOOLS = 1_000
# Fields of a body that this server doesn't know.
MAX_UNKNOWN = 200
