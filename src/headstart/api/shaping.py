"""What requests ask for beside what their bodies say of options: an explanation, the form of the answer."""

from __future__ import annotations

from dataclasses import replace

from fastapi import Request
from msgspec import structs

from headstart.api.structure import Wanted
from headstart.service.requests import Options
from headstart.service.server import Service

EXPLAIN_HEADER = "x-headstart-explain"


def explaining(request: Request, options: Options) -> Options:
    """The explanation may be asked for by a header as well."""
    asked = request.headers.get(EXPLAIN_HEADER, "").lower() in ("1", "true")
    return replace(options, explain=options.explain or asked)


async def shaped(service: Service, options: Options, wanted: Wanted | None) -> Options:
    """Raises BadRequest for a form that can't be enforced."""
    if wanted is None:
        return options
    await service.grammars.check(wanted.grammar, wanted.param)
    calling = options.calling
    if calling.choice != "required":
        # Nothing but its form is in the answer, even where the prompt has opened the reasoning.
        calling = replace(calling, reasoning=False)
    sampling = structs.replace(options.sampling, grammar=wanted.grammar)
    return replace(options, sampling=sampling, calling=calling)
