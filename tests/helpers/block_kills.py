"""Kills processes that write blocks: `python block_kills.py DIRECTORY ROUNDS SEED`.

Each is killed at a random moment. All files that it leaves behind must be whole or unfinished ones, and the
next process takes the directory and removes these. Prints how many kills left an unfinished file. A program
of its own, since it forks, which the threads of others don't survive.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

import blocks
from headstart.engine.states import block_file
from headstart.engine.states.block_directory import BlockDirectory

LONGEST_SECONDS = 0.01


def _work(directory: Path, number: int, tell: int) -> NoReturn:
    """Writes blocks without an end, each once more as long as it is new."""
    with BlockDirectory(directory) as own:
        assert own.acquire()
        os.write(tell, b".")
        parent = None
        while True:
            parent = blocks.header([number, number], parent, sizes=(1_000_000, 1000))
            blocks.write(directory, parent)
            blocks.write(directory, parent)


def _kill_one(directory: Path, number: int, rng: random.Random) -> None:
    heard, tell = os.pipe()
    if not (child := os.fork()):
        try:
            _work(directory, number, tell)
        finally:
            os._exit(1)
    os.close(tell)
    assert os.read(heard, 1) == b"."
    os.close(heard)
    time.sleep(rng.uniform(0, LONGEST_SECONDS))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


def _check(directory: Path) -> bool:
    """Whether there was an unfinished file."""
    names = {path.name for path in directory.iterdir()}
    whole = {name for name in names if name.endswith(block_file.SUFFIX)}
    unfinished = {name for name in names if name.endswith(block_file.UNFINISHED)}
    assert names == {".lock"} | whole | unfinished
    with BlockDirectory(directory) as own:
        assert own.acquire()
        found = own.scan()
        assert own.damaged == 0
        assert {block.path.name for block in found} == whole
        for block in found:
            assert block_file.read(block) == blocks.content(block.header)
        assert {path.name for path in directory.iterdir()} == {".lock"} | whole
        own.remove(found)
    return bool(unfinished)


def main(place: Path, rounds: int, seed: int) -> None:
    rng = random.Random(seed)
    directory = blocks.directory(place)
    unfinished = 0
    for number in range(rounds):
        _kill_one(directory, number, rng)
        unfinished += _check(directory)
    print(unfinished)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
