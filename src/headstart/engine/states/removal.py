"""The rules by which blocks are removed, for the nodes of any tree of blocks. A node is removed together with
all that continue it, and after them, so that no block on a disk ever lacks its parent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import heapify, heappop, heappush
from itertools import count
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


class LinkedNode(Protocol):
    """A block that knows the one it continues."""

    @property
    def parent(self) -> Self | None: ...


class UsedNode(LinkedNode, Protocol):
    """A block with its last use, in seconds."""

    @property
    def used(self) -> float: ...


N = TypeVar("N", bound=Node)
L = TypeVar("L", bound=LinkedNode)
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
    for one, other in zip(some, others[start : start + len(some)], strict=False):
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
    """Whole trees of nodes as `ends_first` orders them, by their last use."""
    return ends_first(nodes, lambda node: node.used)


def ends_first(nodes: Sequence[L], rank: Callable[[L], float]) -> Iterator[L]:
    """The nodes, each after those of them that continue it; among those that could be next, the one of lowest
    rank."""
    n_after = {id(node): 0 for node in nodes}
    for node in nodes:
        if id(node.parent) in n_after:
            n_after[id(node.parent)] += 1
    # The number makes equal ranks comparable.
    numbers = count()
    ends = [(rank(node), next(numbers), node) for node in nodes if n_after[id(node)] == 0]
    heapify(ends)
    while ends:
        node = heappop(ends)[2]
        yield node
        parent = node.parent
        if parent is not None and id(parent) in n_after:
            n_after[id(parent)] -= 1
            if n_after[id(parent)] == 0:
                heappush(ends, (rank(parent), next(numbers), parent))
