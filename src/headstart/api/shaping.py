"""What requests ask for beside what their bodies say of options: an explanation, the form of the answer."""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

from fastapi import Request
from msgspec import structs

from headstart.api.keys import owner
from headstart.api.streaming import while_connected
from headstart.api.structure import Wanted
from headstart.service.generation.prepared import Prepared
from headstart.service.interface.options import Options
from headstart.service.service import Service

EXPLAIN_HEADER = "x-headstart-explain"


def explaining(request: Request, options: Options) -> Options:
    """The explanation may be asked for by a header as well."""
    asked = request.headers.get(EXPLAIN_HEADER, "").lower() in ("1", "true")
    return replace(options, explain=options.explain or asked)


async def while_preparing(
    request: Request, tools: object, preparing: Coroutine[Any, Any, Prepared]
) -> Prepared:
    """What is prepared. Tools may have a grammar that has to be checked, which can take long: it is given up
    when the client leaves."""
    return await (while_connected(request, preparing) if tools else preparing)


async def shaped(request: Request, options: Options, wanted: Wanted | None) -> Options:
    """Raises BadRequest for a form that can't be enforced, or Unavailable."""
    if wanted is None:
        return options
    service: Service = request.app.state.service
    checking = service.grammars.check(wanted.grammar, wanted.param, owner(request))
    await while_connected(request, checking)
    calling = options.calling
    if calling.choice != "required":
        # Nothing but its form is in the answer, even where the prompt has opened the reasoning.
        calling = replace(calling, reasoning=False)
    sampling = structs.replace(options.sampling, grammar=wanted.grammar)
    return replace(options, sampling=sampling, calling=calling)
