"""Several requests answered as one. They run one after the other, and each has all slots, as if it had been
sent alone."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

import msgspec

from headstart.protocol import Stats
from headstart.service.interface.answer import AnswerEvent, Result

Events = AsyncGenerator[AnswerEvent, None]


async def together(runs: Sequence[Events], n: int) -> Events:
    """The events of all `runs`, each with `n` answers, numbered consecutively; one Result for all."""
    results: list[Result] = []
    for at, run in enumerate(runs):
        async with aclosing(run) as events:
            async for event in events:
                if isinstance(event, Result):
                    results.append(event)
                else:
                    yield replace(event, choice=at * n + event.choice)
    yield joined(results)


def joined(results: Sequence[Result]) -> Result:
    """Combines results: counts are summed; it is a hit if all were; other fields are the first one's."""
    misses = [result.miss for result in results if result.miss]
    return replace(
        results[0],
        n_tokens=sum(result.n_tokens for result in results),
        stats=_sum([result.stats for result in results]),
        cache_hit=None if results[0].cache_hit is None else not misses,
        miss=misses[0] if misses else None,
        matched=sum(result.matched for result in results),
    )


def _sum(stats: Sequence[Stats]) -> Stats:
    counted = {
        name: sum(getattr(each, name) for each in stats)
        for name in Stats.__struct_fields__
        if isinstance(getattr(stats[0], name), int | float)
    }
    sources = [each.source for each in stats if each.source != "none"]
    return msgspec.structs.replace(stats[0], **counted, source=sources[0] if sources else "none")
