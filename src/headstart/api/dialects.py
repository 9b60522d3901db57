"""All dialects. Only this module imports from their folders."""

from __future__ import annotations

from headstart.api.anthropic.dialect import ANTHROPIC
from headstart.api.caches.dialect import CACHES
from headstart.api.completions.dialect import COMPLETIONS
from headstart.api.models.dialect import MODELS
from headstart.api.responses.dialect import RESPONSES
from headstart.api.tokens.dialect import TOKENS

# In the order of /openapi.json.
DIALECTS = (COMPLETIONS, RESPONSES, ANTHROPIC, TOKENS, MODELS, CACHES)
