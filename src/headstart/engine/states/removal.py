"""The rules by which blocks are removed, for the nodes of any tree of blocks. A node is removed together with
all that continue it, and after them, so that no block on a disk ever lacks its parent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from heapq import heapify, heappop, heappush
from itertools import islice
from typing import Protocol, Self, TypeVar


class Node(Protocol):
    """A block in a tree; `start`: the position of its first token."""

    @property
    def start(self) -> int: ...
    @property
    def tokens(self) -> Sequence[int]: ...
    @property
    def owner(self) -> str: ...
    @property
    def children(self) -> Iterable[Self]: ...


class UsedNode(Node, Protocol):
    """A block with its last use, in seconds."""

    @property
    def parent(self) -> Self | None: ...
    @property
    def used(self) -> float: ...


N = TypeVar("N", bound=Node)
U = TypeVar("U", bound=UsedNode)


def forgotten(
    firsts: Iterable[N], owner: str | None, tokens: Sequence[int] | None, kept: Sequence[Sequence[int]]
) -> list[N]:
    """The nodes to remove in order to forget a prompt: the owner's that hold a token of it beyond what it has
    in common with a kept prompt, or that continue the whole prompt; and all that continue those, whoever owns
    them. `firsts`: the nodes without parents. `owner` None: of all owners. `tokens` None: every prompt."""
    tops = _beyond(firsts, owner, kept) if tokens is None else _on_path(firsts, owner, tokens, kept)
    return [node for top in tops for node in leaves_first(top)]


def _on_path(
    firsts: Iterable[N], owner: str | None, tokens: Sequence[int], kept: Sequence[Sequence[int]]
) -> Iterator[N]:
    n_kept = max((_n_common(other, tokens, 0) for other in kept), default=0)
    if n_kept == len(tokens):
        return
    # Each with the number of the prompt's tokens before it: all of its predecessors' tokens, or the prompt's.
    waiting = [(node, 0) for node in firsts]
    while waiting:
        node, n = waiting.pop()
        before = n
        if n == node.start:
            n += _n_common(node.tokens, tokens, n)
        is_followed = n == len(tokens)
        if n > n_kept and (n > before or is_followed) and owner in (None, node.owner):
            yield node
        elif is_followed or n == node.start + len(node.tokens):
            waiting.extend((child, n) for child in node.children)


def _beyond(firsts: Iterable[N], owner: str | None, kept: Sequence[Sequence[int]]) -> Iterator[N]:
    # Each with the kept prompts that begin with all tokens before it.
    waiting = [(node, list(kept)) for node in firsts]
    while waiting:
        node, prompts = waiting.pop()
        length = len(node.tokens)
        prompts = [each for each in prompts if _n_common(node.tokens, each, node.start) == length]
        if not prompts and owner in (None, node.owner):
            yield node
        else:
            waiting.extend((child, prompts) for child in node.children)


def _n_common(some: Sequence[int], others: Sequence[int], start: int) -> int:
    """The number of tokens that `some` has in common with `others` from `start` on."""
    n = 0
    for one, other in zip(some, islice(others, start, None), strict=False):
        if one != other:
            break
        n += 1
    return n


def leaves_first(top: N) -> list[N]:
    """The node and all that continue it, each after those that continue it."""
    found = [top]
    for node in found:
        found.extend(node.children)
    return found[::-1]


def oldest_first(nodes: Sequence[U]) -> Iterator[U]:
    """Whole trees of nodes, each after those that continue it; among those that could be next, the one whose
    last use is the longest ago."""
    children = {id(node): len(list(node.children)) for node in nodes}
    # The number makes equal times comparable.
    leaves = [(node.used, number, node) for number, node in enumerate(nodes) if children[id(node)] == 0]
    heapify(leaves)
    while leaves:
        _, number, node = heappop(leaves)
        yield node
        if node.parent is not None:
            children[id(node.parent)] -= 1
            if children[id(node.parent)] == 0:
                heappush(leaves, (node.parent.used, number, node.parent))
