"""The work of the server in the directory of a model, which has one directory for each root. Those that a
worker owns are left alone."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from headstart.engine.states.block_directory import BlockDirectory, directory_of, look
from headstart.engine.states.block_file import ROOT_DIGITS, BlockFile
from headstart.engine.states.removal import forgotten, oldest_first

__all__ = ["BlockDirectory", "directory_of"]

NAME = re.compile(rf"[0-9a-f]{{{ROOT_DIGITS}}}", re.ASCII)


class DirectoryUsage(NamedTuple):
    """`chains`: the number of blocks that none continues."""

    n_bytes: int
    tokens: int
    chains: int


class Removed(NamedTuple):
    """`in_use`: the number of directories in which nothing was removed, since a worker owns them."""

    n_blocks: int
    n_bytes: int
    in_use: int


@dataclass(eq=False, slots=True)
class StoredBlock:
    """A block's file as a node of the tree."""

    file: BlockFile
    parent: StoredBlock | None = None
    children: list[StoredBlock] = field(default_factory=list)

    @property
    def start(self) -> int:
        return self.file.header.start

    @property
    def tokens(self) -> Sequence[int]:
        return self.file.header.tokens

    @property
    def owner(self) -> str:
        return self.file.header.owner

    @property
    def used(self) -> float:
        return self.file.used


def total(path: Path) -> int:
    """The size of all files in a directory and below it."""
    size = 0
    for directory, _, names in os.walk(path):
        for name in names:
            try:
                size += os.lstat(os.path.join(directory, name)).st_size  # noqa: PTH118
            except FileNotFoundError:
                continue
    return size


def usage(model_dir: Path) -> DirectoryUsage:
    """Counts what a model's directory holds, also where a worker owns it. Raises OSError."""
    nodes = [node for path in _directories(model_dir) for node in _nodes(look(path).blocks)]
    return DirectoryUsage(
        sum(node.file.size for node in nodes),
        sum(len(node.tokens) for node in nodes),
        sum(not node.children for node in nodes),
    )


def forget(
    model_dir: Path, owner: str | None, tokens: Sequence[int] | None, kept: Sequence[Sequence[int]]
) -> Removed:
    """Forgets a prompt, as `forgotten` says. Raises OSError, having removed what can be removed."""
    with _trees(model_dir) as trees:
        firsts = [node for node in trees.nodes if node.parent is None]
        return trees.remove(forgotten(firsts, owner, tokens, kept))


def clear(model_dir: Path, owner: str | None) -> Removed:
    """Removes the owner's blocks and all that continue them; None: every block. Raises OSError, having
    removed what can be removed."""
    return forget(model_dir, owner, None, ())


def expire(model_dir: Path, before: float) -> Removed:
    """Removes the blocks last used before a time, in seconds of time.time(), and not continued by others.
    Raises OSError, having removed what can be removed."""
    with _trees(model_dir) as trees:
        return trees.remove(takewhile(lambda node: node.used < before, oldest_first(trees.nodes)))


def shrink(model_dir: Path, n_bytes: int) -> Removed:
    """Removes blocks until at most so many bytes are left where no worker owns them. Those go first whose
    last use is the longest ago and that no other continues. Raises OSError, having removed what can be
    removed."""
    with _trees(model_dir) as trees:
        size = sum(node.file.size for node in trees.nodes)
        removed = []
        for node in oldest_first(trees.nodes):
            if size <= n_bytes:
                break
            removed.append(node)
            size -= node.file.size
        return trees.remove(removed)


@dataclass
class _Trees:
    """The directories of a model that no worker owns, and the blocks in them."""

    directories: list[BlockDirectory]
    nodes: list[StoredBlock]
    in_use: int

    def remove(self, nodes: Iterable[StoredBlock]) -> Removed:
        """Removes the nodes in this order. Raises OSError after having tried all."""
        by_directory: dict[Path, list[BlockFile]] = {each.path: [] for each in self.directories}
        for node in nodes:
            by_directory[node.file.path.parent].append(node.file)
        with ExitStack() as stack:
            for directory in self.directories:
                # Called at the end, one after the other, whatever the others raise.
                stack.callback(directory.remove, by_directory[directory.path])
        blocks = [block for blocks in by_directory.values() for block in blocks]
        return Removed(len(blocks), sum(block.size for block in blocks), self.in_use)


@contextmanager
def _trees(model_dir: Path) -> Iterator[_Trees]:
    """Holds the directories meanwhile, so that no worker starts with them."""
    with ExitStack() as stack:
        directories = [stack.enter_context(BlockDirectory(path)) for path in _directories(model_dir)]
        own = [directory for directory in directories if directory.acquire()]
        nodes = [node for directory in own for node in _nodes(directory.scan())]
        yield _Trees(own, nodes, len(directories) - len(own))


def _directories(model_dir: Path) -> list[Path]:
    """The directories of a model's roots."""
    try:
        with os.scandir(model_dir) as entries:
            names = [each.name for each in entries if each.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    return [model_dir / name for name in sorted(names) if NAME.fullmatch(name)]


def _nodes(blocks: Iterable[BlockFile]) -> list[StoredBlock]:
    """Parents first, as the blocks are."""
    nodes: dict[str, StoredBlock] = {}
    for block in blocks:
        parent = nodes.get(block.header.parent)
        node = nodes[block.header.address] = StoredBlock(block, parent)
        if parent is not None:
            parent.children.append(node)
    return list(nodes.values())
