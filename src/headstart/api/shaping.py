"""Options of requests whose answers must have a form."""

from __future__ import annotations

from dataclasses import replace

from msgspec import structs

from headstart.api.structure import Wanted
from headstart.service.preparation import Options
from headstart.service.server import Service


async def shaped(service: Service, options: Options, wanted: Wanted | None) -> Options:
    """Raises BadRequest for a form that can't be enforced."""
    if wanted is None:
        return options
    await service.grammars.check(wanted.grammar, wanted.param)
    return replace(options, sampling=structs.replace(options.sampling, grammar=wanted.grammar))
