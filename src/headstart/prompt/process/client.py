"""The server's side of a prompt process: starts it, sends it requests of owners in turn, restarts it when it
ends."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from headstart.channel import HEADER
from headstart.errors import BadRequest, ModelLoading, Overloaded, PromptsDied, StartupError, Unavailable
from headstart.prompt.process.link import Link, LinkEnded
from headstart.prompt.process.protocol import Facts, Load, Refused, Reply, Request
from headstart.prompt.process.turns import OwnerTurns
from headstart.prompt.vocabulary import Vocabulary

log = logging.getLogger(__name__)

RESTART_SECONDS = (0.0, 0.2, 1.0, 2.0)
MOST_WAITING = 1024
# Wall-clock limit for a process that is stuck; it ends itself after half as much processor time.
LOAD_SECONDS = 120.0


@dataclass(frozen=True)
class PromptJob:
    data: bytes
    reply: asyncio.Future[Reply]

    def fail(self, error: Exception) -> None:
        if not self.reply.done():
            self.reply.set_exception(error)


class PromptClient:
    """The prompt process of the model `name`. A request that isn't answered within `seconds` ends the
    process."""

    def __init__(self, name: str, seconds: float) -> None:
        self.name, self.seconds = name, seconds
        self._vocabulary: Vocabulary | None = None
        self._load = b""
        self._turns: OwnerTurns[PromptJob] = OwnerTurns()
        self._current: PromptJob | None = None
        self._task: asyncio.Task[None] | None = None
        self._link: Link
        self._failures = 0

    @property
    def vocabulary(self) -> Vocabulary:
        """Raises ModelLoading until it is known; it stays known after that."""
        if self._vocabulary is None:
            raise ModelLoading(f"Model {self.name!r} is still loading.")
        return self._vocabulary

    async def start(self, load: Load) -> None:
        """Starts the process, which runs until `close`. Raises StartupError with the reason of a failure."""
        await self.close()
        self._load = _frame(load)
        try:
            link, facts = await self._start_process()
        except LinkEnded as error:
            reason = f"the process that reads its tokenizer and template failed: {error}"
            raise StartupError(f"{load.path} can't be read: {reason}") from error
        self._vocabulary = Vocabulary(facts)
        self._link, self._failures = link, 0
        self._task = asyncio.create_task(self._work(), name=f"prompts {self.name}")

    async def close(self) -> None:
        """Ends the process; waiting requests fail. It can be started again."""
        if task := self._task:
            task.cancel()
            # If the caller is cancelled during this wait, it stays cancelled; the next caller waits, too.
            await asyncio.wait([task])
            if self._task is task:
                self._task = None
                # A task that was cancelled before it began has given nothing back.
                await self._give_back()

    async def ask(self, owner: str, request: Request) -> Reply:
        """Raises BadRequest if the request is refused, and Unavailable if the model is at fault or no process
        runs."""
        if self._task is None or self._task.done():
            raise ModelLoading(f"Model {self.name!r} is still loading.")
        if len(self._turns) >= MOST_WAITING:
            raise Overloaded(f"{len(self._turns)} prompts wait to be tokenised already.")
        try:
            job = PromptJob(_frame(request), asyncio.get_running_loop().create_future())
        except (RecursionError, OverflowError, ValueError) as error:
            raise BadRequest(
                f"Messages or tools can't be written as JSON: {error}", param="messages"
            ) from error
        self._turns.put(owner, job)
        reply = await job.reply
        match reply:
            case Refused(message=message, always=True):
                raise unfit(self.name, message)
            case Refused(message=message, param=param):
                raise BadRequest(message, param=param)
        return reply

    async def _start_process(self) -> tuple[Link, Facts]:
        """A process that has loaded the model. Raises StartupError or LinkEnded."""
        link = await Link.start()
        try:
            reply = await link.request(self._load, LOAD_SECONDS)
            if isinstance(reply, Facts):
                return link, reply
        except BaseException:
            await link.close()
            raise
        await link.close()
        raise StartupError(
            reply.message
            if isinstance(reply, Refused)
            else "its reply to the load request was not the model's facts"
        )

    async def _work(self) -> None:
        try:
            while True:
                job = self._current = await self._turns.next()
                if job.reply.done():
                    # The requester has gone.
                    continue
                try:
                    reply = await self._reply(job)
                    if not job.reply.done():
                        job.reply.set_result(reply)
                except (LinkEnded, StartupError) as error:
                    log.error("prompt process of %s: %s", self.name, error)
                    job.fail(self._as_unavailable(error))
                    with suppress(LinkEnded, StartupError):
                        await self._restart()
        finally:
            await self._give_back()

    async def _give_back(self) -> None:
        self._fail_all()
        await self._link.close()

    async def _reply(self, job: PromptJob) -> Reply:
        """Repeats the request once if the process was ended from outside. Raises LinkEnded or
        StartupError."""
        try:
            return await self._ask(job)
        except LinkEnded as error:
            if error.may_be_the_requests:
                raise
            log.warning("prompt process of %s: %s", self.name, error)
            return await self._ask(job)

    async def _ask(self, job: PromptJob) -> Reply:
        if self._link.has_ended:
            await self._restart()
        reply = await self._link.request(job.data, self.seconds)
        self._failures = 0
        return reply

    async def _restart(self) -> None:
        """Restarts the process, with a longer wait the more often it has ended without an answer. Raises
        LinkEnded or StartupError."""
        await asyncio.sleep(RESTART_SECONDS[min(self._failures, len(RESTART_SECONDS) - 1)])
        self._failures += 1
        self._link = await self._again()

    async def _again(self) -> Link:
        """Raises LinkEnded or StartupError."""
        link, facts = await self._start_process()
        if self._vocabulary and facts != self._vocabulary.facts:
            await link.close()
            raise StartupError("its file is another than was loaded: unload the model, then load it again")
        return link

    def _as_unavailable(self, error: LinkEnded | StartupError) -> Unavailable:
        if isinstance(error, StartupError):
            return unfit(self.name, str(error))
        died = PromptsDied(
            f"The process that makes prompts for model {self.name!r} ended while it read this one, and is "
            f"started again: {error}."
        )
        died.retryable = not error.may_be_the_requests
        return died

    def _fail_all(self) -> None:
        jobs = [self._current] if self._current else []
        self._current = None
        while len(self._turns):
            jobs.append(self._turns.pop())
        for job in jobs:
            job.fail(ModelLoading(f"Model {self.name!r} was unloaded."))


def _frame(request: Request) -> bytes:
    body = msgspec.json.encode(request)
    return HEADER.pack(len(body)) + body


def unfit(name: str, reason: str) -> Unavailable:
    """The error for a model that no request can use."""
    error = Unavailable(f"Model {name!r} can't run: {reason}")
    error.retryable = False
    return error


async def facts_of(path: str, template: str | None) -> Facts:
    """Facts of a model's file, read by a process that ends afterwards. Raises StartupError."""
    client = PromptClient("", LOAD_SECONDS)
    try:
        await client.start(Load(path, template))
        return client.vocabulary.facts
    finally:
        await client.close()
