"""The management of caches in the list of dialects."""

from __future__ import annotations

from headstart.api.caches import files, routes, states, verify
from headstart.api.caches.examples import EXAMPLES
from headstart.api.caches.schema import ANSWERS
from headstart.api.dialect import Dialect

CACHES = Dialect(
    prefixes=("/v1/cache", "/v1/verify"),
    # The path of a cache would also match that of its file.
    routers=[files.router, routes.router, states.router, verify.router],
    answers=ANSWERS,
    examples=EXAMPLES,
)
