"""The rules of removal, on any tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from headstart.engine.states.removal import forgotten, leaves_first, oldest_first


@dataclass(eq=False)
class Leaf:
    tokens: list[int]
    owner: str = ""
    parent: Leaf | None = None
    used: float = 0.0
    children: list[Leaf] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.parent:
            self.parent.children.append(self)

    @property
    def text(self) -> list[int]:
        return [*self.parent.text, *self.tokens] if self.parent else self.tokens

    @property
    def start(self) -> int:
        return len(self.text) - len(self.tokens)


Tokens = st.lists(st.integers(0, 1), max_size=6)


@st.composite
def trees(draw: st.DrawFn) -> list[Leaf]:
    """Nodes of several trees, parents first; private nodes may continue public ones."""
    nodes: list[Leaf] = []
    for _ in range(draw(st.integers(0, 8))):
        tokens = draw(st.lists(st.integers(0, 1), min_size=1, max_size=3))
        parent = draw(st.sampled_from([None, *nodes]))
        owner = parent.owner if parent and parent.owner else draw(st.sampled_from(["", "alice", "bob"]))
        nodes.append(Leaf(tokens, owner, parent, draw(st.integers(0, 3))))
    return nodes


def common(some: Sequence[int], others: Sequence[int]) -> int:
    return next(
        (n for n, (a, b) in enumerate(zip(some, others, strict=False)) if a != b), min(len(some), len(others))
    )


def is_meant(node: Leaf, tokens: list[int] | None, kept: list[list[int]]) -> bool:
    """Whether a node holds or continues what is to be forgotten."""
    if tokens is None:
        return max((common(node.text, each) for each in kept), default=0) < len(node.text)
    shared = common(node.text, tokens)
    beyond = shared > max((common(tokens, each) for each in kept), default=0)
    return beyond and (shared > node.start or shared == len(tokens))


def line(node: Leaf) -> list[Leaf]:
    """The node and all before it."""
    return [node, *line(node.parent)] if node.parent else [node]


@given(trees(), st.none() | st.sampled_from(["", "alice"]), st.none() | Tokens, st.lists(Tokens, max_size=2))
def test_what_is_forgotten_holds_or_continues_what_is_not_kept(
    nodes: list[Leaf], owner: str | None, tokens: list[int] | None, kept: list[list[int]]
) -> None:
    firsts = [node for node in nodes if not node.parent]
    gone = forgotten(firsts, owner, tokens, kept)
    tops = [node for node in nodes if owner in (None, node.owner) and is_meant(node, tokens, kept)]
    expected = [node for node in nodes if any(each in tops for each in line(node))]
    assert sorted(map(id, gone)) == sorted(map(id, expected))
    for number, node in enumerate(gone):
        assert not {id(child) for child in node.children} & {id(each) for each in gone[number:]}


def test_what_an_owner_continues_publicly_is_forgotten_with_the_prompt_only() -> None:
    """Blocks that only begin with the same public text hold nothing of the prompt's own."""
    public = Leaf([1, 2])
    own, others, elsewhere = (
        Leaf([3, 4], "alice", public),
        Leaf([3, 4], "bob", public),
        Leaf([5], "alice", public),
    )
    further = Leaf([6], "alice", own)
    assert forgotten([public], "alice", [1, 2, 3], []) == [further, own]
    assert forgotten([public], "alice", [1, 2, 3, 7], [[1, 2]]) == [further, own]
    assert forgotten([public], "alice", [1, 2, 3], [[1, 2, 3]]) == []
    assert forgotten([public], "alice", [1, 9], []) == []
    for whole in ([1], [1, 2]):
        assert set(forgotten([public], "alice", whole, [])) == {further, own, elsewhere}
    assert set(forgotten([public], None, [1, 9], [])) == {public, own, others, further, elsewhere}


@given(trees())
def test_leaves_come_first_and_of_them_the_oldest(nodes: list[Leaf]) -> None:
    present = list(nodes)
    for node in oldest_first(nodes):
        leaves = [each for each in present if not set(map(id, each.children)) & set(map(id, present))]
        assert id(node) in map(id, leaves)
        assert node.used == min(each.used for each in leaves)
        present = [each for each in present if each is not node]
    assert present == []


def test_a_chain_longer_than_the_stack_is_walked() -> None:
    @dataclass(eq=False)
    class Link:
        start: int
        parent: Link | None
        owner: str = ""
        used: float = 0.0
        children: tuple[Link, ...] = ()

        @property
        def tokens(self) -> range:
            return range(self.start, self.start + 2)

    first = last = Link(0, None)
    for start in range(2, 40_000, 2):
        link = Link(start, last)
        last.children = (link,)
        last = link
    prompt = list(range(50_000))
    assert len(forgotten([first], None, prompt, [prompt[:11]])) == 20_000 - 5
    assert len(forgotten([first], None, None, [prompt[:11]])) == 20_000 - 5
    assert leaves_first(first)[0] is last
    assert [node.start for node in oldest_first(leaves_first(first))][:2] == [39_998, 39_996]
