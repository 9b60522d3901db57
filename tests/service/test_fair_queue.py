"""Nobody waits for all that another asks for: owners take turns."""

from __future__ import annotations

import asyncio
import random

import pytest

from headstart.errors import Overloaded
from headstart.round_robin import RoundRobin
from headstart.service.generation.fair_queue import FairQueue
from sweeps import rounds


class Workshop:
    """Work that waits in a queue, and ends when it is told to."""

    def __init__(self, queue: FairQueue) -> None:
        self.queue = queue
        self.begun: list[str] = []
        self._ends: dict[str, asyncio.Event] = {}

    async def work(self, name: str) -> None:
        """`name` begins with its owner's letter."""
        self._ends[name] = asyncio.Event()
        async with self.queue.turn(name[0]):
            self.begun.append(name)
            await self._ends[name].wait()

    async def start(self, *names: str) -> list[asyncio.Task[None]]:
        tasks = [asyncio.create_task(self.work(name)) for name in names]
        await settled()
        return tasks

    async def end(self, name: str) -> None:
        self._ends[name].set()
        await settled()


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def workshop(places: int = 1, most: int = 100) -> Workshop:
    return Workshop(FairQueue(most, places))


async def finished(shop: Workshop, tasks: list[asyncio.Task[None]]) -> list[str]:
    """The order in which all of it began."""
    while len(shop.begun) < len(tasks) or not all(task.done() for task in tasks):
        for name in list(shop.begun):
            await shop.end(name)
    return shop.begun


async def test_owners_take_turns_however_much_one_asks_for() -> None:
    shop = workshop()
    tasks = await shop.start("a1", "a2", "a3", "a4", "b1", "c1", "b2")
    assert await finished(shop, tasks) == ["a1", "a2", "b1", "c1", "a3", "b2", "a4"]


async def test_so_many_work_at_once_as_there_are_places() -> None:
    shop = workshop(places=2)
    tasks = await shop.start("a1", "a2", "a3", "b1")
    assert shop.begun == ["a1", "a2"]
    await shop.end("a2")
    assert shop.begun == ["a1", "a2", "a3"]
    await shop.end("a1")
    assert shop.begun == ["a1", "a2", "a3", "b1"]
    await finished(shop, tasks)
    assert shop.queue.n_waiting == 0


async def test_who_leaves_the_queue_takes_no_place() -> None:
    shop = workshop()
    working, leaving, waiting = await shop.start("a1", "a2", "a3")
    leaving.cancel()
    await settled()
    await shop.end("a1")
    assert shop.begun == ["a1", "a3"]
    await finished(shop, [working, waiting])


async def test_who_leaves_just_as_it_gets_its_turn_passes_it_on() -> None:
    shop = workshop()
    async with shop.queue.turn("a"):
        leaving, last = await shop.start("a2", "a3")
    leaving.cancel()
    await settled()
    assert shop.begun == ["a3"]
    await finished(shop, [last])


async def test_more_than_may_wait_are_refused() -> None:
    shop = workshop(most=2)
    tasks = await shop.start("a1", "a2", "a3")
    with pytest.raises(Overloaded):
        await shop.work("a4")
    assert shop.queue.n_waiting == 2
    await finished(shop, tasks)


async def test_one_owner_cannot_fill_the_queue_for_the_others() -> None:
    shop = workshop(most=4)
    tasks = await shop.start("a1", "a2", "a3", "a4", "a5")
    others = await shop.start("b1", "b2")
    assert [task.done() for task in tasks] == [False, False, False, True, True]
    for refused in tasks[3:]:
        assert isinstance(refused.exception(), Overloaded)
    # The others have as many now, and get no more.
    with pytest.raises(Overloaded):
        await shop.work("b3")
    assert await finished(shop, [*tasks[:3], *others]) == ["a1", "a2", "b1", "a3", "b2"]


async def test_where_nobody_may_wait_who_finds_no_place_is_refused() -> None:
    shop = workshop(most=0)
    tasks = await shop.start("a1")
    with pytest.raises(Overloaded):
        await shop.work("b1")
    await finished(shop, tasks)
    await finished(shop, [*tasks, *await shop.start("b2")])


async def sleeping(
    queue: FairQueue, owner: str, chance: random.Random, at_work: list[str], most: int
) -> None:
    async with queue.turn(owner):
        at_work.append(owner)
        try:
            assert len(at_work) <= most
            for _ in range(chance.randrange(3)):
                await asyncio.sleep(0)
        finally:
            at_work.remove(owner)


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(rounds(200)))
async def test_no_place_is_lost_or_given_twice_whoever_leaves_when(seed: int) -> None:
    chance = random.Random(seed)
    places = chance.randrange(1, 4)
    queue = FairQueue(chance.randrange(12), places)
    at_work: list[str] = []
    tasks: list[asyncio.Task[None]] = []
    for _ in range(200):
        match chance.randrange(3):
            case 0 | 1:
                work = sleeping(queue, chance.choice("abc"), chance, at_work, places)
                tasks.append(asyncio.create_task(work))
            case 2 if tasks:
                chance.choice(tasks).cancel()
        if chance.random() < 0.5:
            await asyncio.sleep(0)
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        assert result is None or isinstance(result, Overloaded | asyncio.CancelledError)
    assert queue.n_waiting == 0
    assert queue._free == places


def test_round_robin_keeps_each_owners_order() -> None:
    waiting: RoundRobin[int] = RoundRobin()
    for owner, thing in [("a", 1), ("a", 2), ("b", 3), ("a", 4), ("b", 5)]:
        waiting.put(owner, thing)
    assert waiting.last_of_longest() == ("a", 4)
    waiting.remove("a", 2)
    waiting.remove("a", 99)
    waiting.remove("nobody", 1)
    assert [waiting.take() for _ in range(len(waiting))] == [1, 3, 4, 5]
