"""The server looks after the directory of a model that no worker owns."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import blocks
from headstart.engine.states.block_file import BlockHeader
from headstart.engine.states.directory import BlockDirectory, clear, expire, forget, shrink, total, usage

OTHER_ROOT = "c3" * 32
PROMPT = list(range(100, 120))


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A model with two roots; in each a prompt as three owners sent it, and what they went on with."""
    for root in (blocks.ROOT, OTHER_ROOT):
        place = blocks.directory(tmp_path / "model", root)
        for owner in ("", "alice", "bob"):
            trunk = blocks.write_chain(place, PROMPT, root=root, owner=owner)
            blocks.write_chain(place, [1, 2, 3], trunk[-1], root=root, owner=owner)
            blocks.write_chain(place, [4, 5, 6, 7, 8], trunk[1], root=root, owner=owner)
            blocks.write_chain(place, [50 + len(owner)] * 6, root=root, owner=owner)
    return tmp_path / "model"


def left(model_dir: Path, root: str = blocks.ROOT) -> list[BlockHeader]:
    with BlockDirectory(blocks.directory(model_dir, root)) as own:
        assert own.acquire()
        return [block.header for block in own.scan()]


def texts(headers: list[BlockHeader], owner: str) -> set[tuple[int, ...]]:
    """The tokens of each chain of an owner."""
    by_address = {header.address: header for header in headers}
    ends = set(by_address) - {header.parent for header in headers}
    chains = set()
    for header in (by_address[end] for end in ends):
        if header.owner == owner:
            tokens, at = list(header.tokens), header
            while at.parent:
                at = by_address[at.parent]
                tokens = [*at.tokens, *tokens]
            chains.add(tuple(tokens))
    return chains


def test_usage_counts_both_roots(model_dir: Path) -> None:
    size = sum(path.stat().st_size for path in model_dir.rglob("*.block"))
    assert usage(model_dir) == (size, 2 * 3 * (20 + 3 + 5 + 6), 2 * 3 * 3)
    assert total(model_dir) == size
    with BlockDirectory(blocks.directory(model_dir)) as worker:
        assert worker.acquire()
        assert usage(model_dir).n_bytes == size
    (blocks.directory(model_dir) / "x.unfinished").write_bytes(bytes(100))
    assert total(model_dir) == size + 100
    assert usage(model_dir).n_bytes == size


def test_a_model_without_a_directory_has_nothing(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert usage(missing) == (0, 0, 0)
    assert total(missing) == 0
    for removed in (
        clear(missing, None),
        forget(missing, None, [1], []),
        expire(missing, 1e12),
        shrink(missing, 0),
    ):
        assert removed == (0, 0, 0)
    assert not missing.exists()


def test_clearing_an_owner_leaves_the_others(model_dir: Path) -> None:
    before = usage(model_dir)
    removed = clear(model_dir, "alice")
    assert (removed.n_blocks, removed.in_use) == (2 * 10, 0)
    assert usage(model_dir).n_bytes == before.n_bytes - removed.n_bytes
    for root in (blocks.ROOT, OTHER_ROOT):
        assert {header.owner for header in left(model_dir, root)} == {"", "bob"}


def test_clearing_all_leaves_no_block(model_dir: Path) -> None:
    place = blocks.directory(model_dir)
    (place / "x.unfinished").touch()
    (place / f"{'0' * 64}.block").write_bytes(b"damaged")
    assert clear(model_dir, None).n_blocks == 2 * 3 * 10
    assert [path.name for path in model_dir.rglob("*") if path.is_file()] == [".lock", ".lock"]
    assert usage(model_dir) == (0, 0, 0)


def test_a_prompt_is_forgotten_in_all_roots_with_what_continues_it(model_dir: Path) -> None:
    removed = forget(model_dir, "alice", PROMPT, [])
    assert removed.n_blocks == 2 * 8
    for root in (blocks.ROOT, OTHER_ROOT):
        headers = left(model_dir, root)
        assert texts(headers, "alice") == {(55,) * 6}
        for owner in ("", "bob"):
            assert len(texts(headers, owner)) == 3


def test_of_all_owners_a_prompt_is_forgotten_up_to_what_a_kept_one_has(model_dir: Path) -> None:
    forget(model_dir, None, PROMPT, [PROMPT[:4], [*PROMPT[:8], 4, 5, 6]])
    headers = left(model_dir)
    for owner in ("", "alice", "bob"):
        assert texts(headers, owner) == {(*PROMPT[:8], 4, 5, 6, 7, 8), (50 + len(owner),) * 6}


def test_a_prompt_that_ends_within_a_block_takes_it_along(model_dir: Path) -> None:
    forget(model_dir, "bob", PROMPT[:9], [PROMPT[:8]])
    assert texts(left(model_dir), "bob") == {(*PROMPT[:8], 4, 5, 6, 7, 8), (53,) * 6}


def test_a_prompt_that_is_kept_as_a_whole_takes_nothing(model_dir: Path) -> None:
    assert forget(model_dir, None, PROMPT, [[1], [*PROMPT, 1]]).n_blocks == 0
    assert forget(model_dir, None, [999], []).n_blocks == 0


def test_forgetting_every_prompt_leaves_what_kept_ones_have(model_dir: Path) -> None:
    forget(model_dir, "alice", None, [PROMPT[:14], [55] * 9])
    headers = left(model_dir)
    assert texts(headers, "alice") == {tuple(PROMPT[:12]), (55,) * 6}
    assert len(texts(headers, "bob")) == 3


def test_a_directory_in_use_is_left_alone_and_counted(model_dir: Path) -> None:
    with BlockDirectory(blocks.directory(model_dir)) as worker:
        assert worker.acquire()
        kept = [block.header for block in worker.scan()]
        assert forget(model_dir, None, PROMPT, []).in_use == 1
        assert expire(model_dir, 1e12).in_use == 1
        assert shrink(model_dir, 0).in_use == 1
        assert clear(model_dir, None) == (0, 0, 1)
        assert [block.header for block in worker.scan()] == kept
    assert left(model_dir, OTHER_ROOT) == []
    assert clear(model_dir, None).in_use == 0


def test_only_folders_named_as_roots_are_touched(model_dir: Path, tmp_path: Path) -> None:
    for name in ("notes", "5A" * 8, "5a" * 7, "5a" * 9):
        (model_dir / name).mkdir()
        (model_dir / name / "x.block").touch()
    outside = blocks.directory(tmp_path / "outside", "11" * 32)
    blocks.write_chain(outside, PROMPT, root="11" * 32)
    (model_dir / outside.name).symlink_to(outside)
    before = usage(model_dir)
    assert clear(model_dir, None).n_bytes == before.n_bytes
    assert len(list(model_dir.rglob("x.block"))) == 4
    assert len(list(outside.iterdir())) == 5


def _used(place: Path, tokens: list[int], used: float, parent: BlockHeader | None = None) -> BlockHeader:
    (header,) = blocks.write_chain(place, tokens, parent, used=used)
    return header


def test_blocks_expire_by_their_last_use_but_not_before_what_continues_them(tmp_path: Path) -> None:
    place = blocks.directory(tmp_path)
    old = _used(place, [1], 10)
    _used(place, [2], 10, old)
    fresh = _used(place, [3], 100, old)
    _used(place, [4], 30, fresh)
    assert expire(tmp_path, 10).n_blocks == 0
    assert expire(tmp_path, 50).n_blocks == 2
    assert {tuple(header.tokens) for header in left(tmp_path)} == {(1,), (3,)}
    assert expire(tmp_path, 101).n_blocks == 2


def test_the_oldest_blocks_go_first_to_make_room_whatever_their_root(tmp_path: Path) -> None:
    place = blocks.directory(tmp_path)
    trunk = _used(place, [1], 5)
    _used(place, [2], 60, trunk)
    _used(place, [3], 20, trunk)
    other = blocks.directory(tmp_path, OTHER_ROOT)
    blocks.write_chain(other, [4], root=OTHER_ROOT, used=30)
    assert shrink(tmp_path, usage(tmp_path).n_bytes).n_blocks == 0
    one = usage(tmp_path).n_bytes // 4
    for n, expected in ((3, {1, 2, 4}), (2, {1, 2}), (1, {1}), (0, set())):
        # Their sizes differ by some bytes.
        shrink(tmp_path, n * one + n)
        both = left(tmp_path) + left(tmp_path, OTHER_ROOT)
        assert {header.tokens[0] for header in both} == expected


def test_a_directory_that_cannot_be_read_raises(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"a file")
    with pytest.raises(NotADirectoryError):
        usage(tmp_path / "model")


def test_blocks_that_cannot_be_removed_raise_after_the_others_are(model_dir: Path) -> None:
    kept = next(blocks.directory(model_dir).glob("*.block"))
    if os.system(f"chattr +i '{kept}' 2>/dev/null"):
        pytest.skip("files can't be made immutable here")
    try:
        with pytest.raises(PermissionError):
            clear(model_dir, None)
    finally:
        os.system(f"chattr -i '{kept}'")
    assert list(model_dir.rglob("*.block")) == [kept]
