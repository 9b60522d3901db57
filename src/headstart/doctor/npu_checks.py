"""The first checks of a model on a real board: steps that each run in a process of their own, and a report
of what came of them that somebody can send."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from headstart import __version__
from headstart.config.settings import Settings
from headstart.doctor.board import Board, examine_board, npu_settings
from headstart.engine.kinds import engine_kind
from headstart.engine.rkllm.build import options_of
from headstart.engine.rkllm.first_checks import STEPS, Task
from headstart.engine.worker_process import worker_environment
from headstart.errors import StartupError
from headstart.machine import module_command, signal_name
from headstart.prompt.process.client import PromptClient
from headstart.prompt.process.protocol import ChatPrefix, ChatPrompt, Load
from headstart.prompt.process.requests import PromptRequests
from headstart.service.models.model import Notify, model_path, template_of
from headstart.service.models.plan import engine_settings

STEP_SECONDS = 600
STDERR_LINES = 20
# A step that tries what Headstart avoids.
LEFT_ALONE = "loaded_after_abort"
# About 300 tokens each, so that prefilling them and not doing so differ by more than chance.
OPENINGS = (
    "You are an experienced gardener who answers briefly, names one plant and says when to water it. " * 15,
    "You are a patient teacher of arithmetic who shows each step and ends with the result alone. " * 15,
)
QUESTION = "What should I begin with?"
# A text, and how many tokens it has.
Counted = tuple[str, int]


class CheckStep(Struct, frozen=True):
    """`found` is None if the step failed: by `signal`, if the runtime crashed, or with `error`. `log`:
    the last lines that it wrote."""

    name: str
    about: str
    found: dict[str, Any] | None = None
    error: str | None = None
    signal: str | None = None
    log: list[str] = []


class Checks(Struct, frozen=True):
    headstart: str
    model: str
    model_bytes: int
    board: Board
    steps: list[CheckStep]

    @property
    def failed(self) -> bool:
        """Whether a step failed that Headstart depends on."""
        needed = [step for step in self.steps if step.name != LEFT_ALONE]
        return not needed or any(step.found is None for step in needed)


def check_npu(name: str, settings: Settings, say: Notify) -> Checks:
    """Runs the first checks on the model of this name. Takes minutes. Raises StartupError if it is no
    model for the NPU, or can't be read."""
    path = model_path(settings.model_paths.get(name, name))
    if not engine_kind(path).on_npu:
        raise StartupError(f"{name!r} is neither a .rkllm file nor the name of a model that is one.")
    npu_settings(path, settings)
    engine = engine_settings(path, settings)
    openings, question = asyncio.run(_texts(path, settings, name))
    task = Task("", path, options_of(engine), openings, question)
    board = examine_board(engine.rkllm)
    steps = list(_run_all(task, say)) if board.runtime else []
    return Checks(__version__, Path(path).name, Path(path).stat().st_size, board, steps)


def _run_all(task: Task, say: Notify) -> Iterator[CheckStep]:
    for number, name in enumerate(STEPS, 1):
        say(f"Step {number} of {len(STEPS)}: {_about(name)}")
        yield _run(name, msgspec.structs.replace(task, step=name))


def _run(name: str, task: Task) -> CheckStep:
    command = module_command("headstart.engine.rkllm.first_checks")
    try:
        done = subprocess.run(
            command,
            input=msgspec.json.encode(task),
            capture_output=True,
            timeout=STEP_SECONDS,
            check=False,
            env=worker_environment(),
        )
    except subprocess.TimeoutExpired:
        return CheckStep(name, _about(name), error=f"not done after {STEP_SECONDS} seconds")
    log = done.stderr.decode(errors="replace").splitlines()[-STDERR_LINES:]
    if done.returncode < 0:
        return CheckStep(name, _about(name), signal=signal_name(-done.returncode), log=log)
    if done.returncode:
        return CheckStep(name, _about(name), error=log[-1] if log else f"status {done.returncode}", log=log)
    # The runtime may write to the output, too.
    return CheckStep(name, _about(name), found=msgspec.json.decode(done.stdout.splitlines()[-1]), log=log)


def _about(name: str) -> str:
    return " ".join((STEPS[name].__doc__ or "").split())


async def _texts(path: str, settings: Settings, name: str) -> tuple[tuple[Counted, Counted], Counted]:
    """The openings and the question that follows the first of them. Raises StartupError."""
    client = PromptClient(name, settings.prompt_timeout)
    try:
        await client.start(Load(path, template_of(name, settings)))
        prompts = PromptRequests(client, "", can_cut=True)
        one, other = [ChatPrefix([{"role": "system", "content": text}]) for text in OPENINGS]
        chat = ChatPrompt([*one.messages, {"role": "user", "content": QUESTION}])
        first, second, whole = await prompts.tokens(one, other, chat)
    finally:
        await client.close()
    counted = [
        (client.vocabulary.text(tokens), len(tokens)) for tokens in (first, second, whole[len(first) :])
    ]
    return (counted[0], counted[1]), counted[2]
