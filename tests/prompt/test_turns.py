"""Those who wait for a model's prompt process take turns by owner."""

from __future__ import annotations

import asyncio

from headstart.prompt.process.turns import OwnerTurns


async def test_one_owner_with_many_does_not_keep_others_waiting() -> None:
    turns: OwnerTurns[str] = OwnerTurns()
    for number in range(3):
        turns.put("busy", f"busy {number}")
    turns.put("other", "other 0")
    turns.put("third", "third 0")
    assert [await turns.next() for _ in range(len(turns))] == [
        "busy 0",
        "other 0",
        "third 0",
        "busy 1",
        "busy 2",
    ]


async def test_who_comes_to_an_empty_queue_is_waited_for() -> None:
    turns: OwnerTurns[str] = OwnerTurns()
    waiting = asyncio.create_task(turns.next())
    await asyncio.sleep(0)
    assert not waiting.done()
    turns.put("one", "late")
    assert await waiting == "late"
    assert len(turns) == 0
