"""Size limits for untrusted JSON of any source.

For comparison, an agent's request of 100 KB with 30 tools has some 900 objects and lists, 4,000 strings and 8
levels.
"""

from __future__ import annotations

# Parsers, templates and grammars recurse; the weakest of them fails at some 200 levels.
MAX_DEPTH = 64
MAX_CONTAINERS = 50_000
MAX_STRINGS = 100_000
# Token ids are values, too. OpenAI accepts 300,000 of them in one embedding request.
MAX_VALUES = 320_000

MAX_MESSAGES = 10_000
MAX_TOOLS = 1_000
# Unknown fields of a body.
MAX_UNKNOWN = 200
