"""The file of a block gives back what was written, or says that it can't."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import stat
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

import block_kills
import blocks
from headstart.engine.states import block_file
from headstart.engine.states.block_file import BlockFile, DamagedBlock, address_of
from headstart.engine.states.block_header import MAX_BYTES, MAX_TOKENS
from mounts import mounted

TOKENS = list(range(1000, 1050))
PARENT = blocks.header([1, 2, 3])


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return blocks.directory(tmp_path)


def loaded(path: Path) -> tuple[memoryview, memoryview]:
    return block_file.read(block_file.read_header(path))


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


@pytest.mark.parametrize(
    "header",
    [
        blocks.header(TOKENS),
        blocks.header([2**31 - 1, 0]),
        blocks.header(list(range(MAX_TOKENS)), PARENT, owner="a" * 64, cuts=tuple(range(3, 260))),
        blocks.header(TOKENS, PARENT, cuts=None, run="7" * 32),
        blocks.header(TOKENS, sizes=(0, 0)),
        blocks.header(TOKENS, sizes=(0, 5000)),
        blocks.header(TOKENS, sizes=(3_000_001, 200_003)),
    ],
    ids=["plain", "large-ids", "longest-header", "decoded", "empty", "checkpoint", "large"],
)
def test_a_block_is_read_as_it_was_written(place: Path, header: block_file.BlockHeader) -> None:
    written = blocks.write(place, header)
    found = block_file.read_header(written.path)
    assert found == written
    assert found.header == header
    assert loaded(written.path) == block_file.read(written) == blocks.content(header)
    assert written.size == written.path.stat().st_size
    assert names(place) == [f"{header.address}.block"]
    assert stat.S_IMODE(written.path.stat().st_mode) == 0o600


def test_what_was_read_belongs_to_the_reader(place: Path) -> None:
    written = blocks.write(place, blocks.header(TOKENS, sizes=(100_000, 100_000)))
    data, checkpoint = block_file.read(written)
    written.path.unlink()
    assert (data, checkpoint) == blocks.content(written.header)
    data[0] = checkpoint[0] = 1


def test_a_block_may_be_written_again(place: Path) -> None:
    header = blocks.header(TOKENS)
    blocks.write(place, header)
    again = blocks.write(place, header)
    assert block_file.read(again) == blocks.content(header)
    assert names(place) == [f"{header.address}.block"]


@pytest.mark.parametrize(
    "other",
    [
        {"parent": "00" * 32},
        {"root": "00" * 32},
        {"owner": "alice"},
        {"start": 1},
        {"tokens": [1, 2, 4]},
        {"tokens": [1, 2]},
        {"cuts": (2,)},
        {"cuts": None, "run": "1"},
        {"cuts": None},
    ],
    ids=str,
)
def test_an_address_covers_all_that_values_depend_on(other: dict[str, Any]) -> None:
    usual: dict[str, Any] = {
        "parent": "",
        "root": blocks.ROOT,
        "owner": "",
        "start": 0,
        "tokens": [1, 2, 3],
        "cuts": (),
        "run": "",
    }
    assert address_of(**usual) == address_of(**usual | {"tokens": array("i", [1, 2, 3])})
    assert address_of(**usual | other) != address_of(**usual)


def test_roots_matter_to_first_blocks_and_through_them_to_all() -> None:
    others = blocks.header([1, 2, 3], root="00" * 32)
    assert others.address != PARENT.address
    assert blocks.header([4], PARENT).address != blocks.header([4], others).address


def _spread(size: int) -> list[int]:
    return sorted({size * i // 200 for i in range(200)})


def test_a_changed_byte_anywhere_is_noticed(place: Path) -> None:
    path = blocks.write(place, blocks.header(TOKENS, sizes=(1000, 500))).path
    whole = path.read_bytes()
    offsets = _spread(len(whole))
    assert len(offsets) == 200
    for offset in offsets:
        changed = bytearray(whole)
        changed[offset] ^= 1 << offset % 8
        path.write_bytes(changed)
        with pytest.raises(DamagedBlock, match=path.name):
            loaded(path)
    path.write_bytes(whole)
    loaded(path)


def test_a_file_of_another_length_is_noticed(place: Path) -> None:
    path = blocks.write(place, blocks.header(TOKENS, sizes=(1000, 500))).path
    whole = path.read_bytes()
    for n in _spread(len(whole)):
        path.write_bytes(whole[:n])
        with pytest.raises(DamagedBlock):
            block_file.read_header(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(DamagedBlock, match="another length"):
        block_file.read_header(path)


def _overwrite(block: BlockFile) -> None:
    with block.path.open("r+b") as file:
        file.seek(block.size - 1)
        file.write(b"x")


def _cut(block: BlockFile) -> None:
    os.truncate(block.path, block.size - 1)


def _substitute(block: BlockFile) -> None:
    other = blocks.header([7], root=block.header.root)
    (block.path.parent / f"{other.address}.block").rename(block.path)


def _copy(block: BlockFile) -> None:
    """The content stays, but nobody knows who put it there."""
    copy = block.path.with_name("copy")
    shutil.copy(block.path, copy)
    copy.rename(block.path)


def _to_pipe(block: BlockFile) -> None:
    block.path.unlink()
    os.mkfifo(block.path)


@pytest.mark.parametrize("change", [_overwrite, _cut, _substitute, _copy, _to_pipe])
def test_a_file_that_changes_after_its_header_was_read_is_noticed(
    place: Path, change: Callable[[BlockFile], None]
) -> None:
    blocks.write(place, blocks.header([7], sizes=(1000, 0)))
    block = block_file.read_header(blocks.write(place, blocks.header(TOKENS)).path)
    change(block)
    with pytest.raises(DamagedBlock, match=block.path.name):
        block_file.read(block)


def test_a_file_that_is_gone_is_an_error_of_the_system(place: Path) -> None:
    block = blocks.write(place, blocks.header(TOKENS))
    block_file.remove(block)
    block_file.remove(block)
    block_file.touch(block)
    with pytest.raises(FileNotFoundError):
        block_file.read(block)
    with pytest.raises(FileNotFoundError):
        block_file.read_header(block.path)


def test_a_file_under_another_name_or_root_is_none(place: Path, tmp_path: Path) -> None:
    path = blocks.write(place, blocks.header(TOKENS)).path
    shutil.copy(path, place / f"{PARENT.address}.block")
    with pytest.raises(DamagedBlock, match="named after another"):
        block_file.read_header(place / f"{PARENT.address}.block")
    elsewhere = blocks.directory(tmp_path, "00" * 32)
    shutil.copy(path, elsewhere)
    with pytest.raises(DamagedBlock, match="another root"):
        block_file.read_header(elsewhere / path.name)


USUAL: dict[str, Any] = {
    "address": "",
    "parent": "",
    "root": blocks.ROOT,
    "start": 0,
    "owner": "",
    "cuts": [],
    "run": "",
    "n_tokens": 3,
    "data_bytes": 10,
    "checkpoint_bytes": 0,
    "created": 1.5,
    "hashes": [bytes(32), bytes(32)],
}


def _forge(place: Path, changes: dict[str, Any], ids: list[int], size: int = 10) -> Path:
    """A file whose header contradicts nothing but what the changes do."""
    fields = USUAL | changes
    if not fields["address"]:
        cuts = fields["cuts"]
        keys = ("parent", "root", "owner", "start", "run")
        rest = {key: fields[key] for key in keys}
        fields["address"] = address_of(**rest, tokens=ids, cuts=cuts)
    path = place / f"{fields['address']}.block"
    beginning = blocks.forged(fields, array("i", ids).tobytes())
    path.write_bytes(beginning)
    os.truncate(path, len(beginning) + size)
    return path


def test_a_forged_header_that_contradicts_nothing_is_read(place: Path) -> None:
    assert block_file.read_header(_forge(place, {}, [1, 2, 3])).header.data_bytes == 10


@pytest.mark.parametrize(
    "changes",
    [
        {"address": "A" * 64},
        {"address": "0" * 64},
        {"parent": "0" * 63},
        {"parent": "0" * 64},
        {"start": 5},
        {"start": -1},
        {"start": 1 << 31},
        {"start": True},
        {"owner": "x" * 129},
        {"owner": b"x"},
        {"cuts": [-4]},
        {"cuts": [4]},
        {"cuts": [2, 1]},
        {"cuts": [1, 1]},
        {"cuts": [1.0]},
        {"cuts": None},
        {"run": "1"},
        {"cuts": None, "run": "1" * 65},
        {"n_tokens": 0},
        {"n_tokens": 4},
        {"n_tokens": MAX_TOKENS + 1},
        {"n_tokens": 1 << 62},
        {"data_bytes": 11},
        {"data_bytes": -1},
        {"data_bytes": (1 << 64) - 1},
        {"checkpoint_bytes": 1 << 62},
        {"created": float("nan")},
        {"created": float("inf")},
        {"created": "now"},
        {"hashes": [bytes(32)]},
        {"hashes": [bytes(31), bytes(32)]},
        {"more": 1},
    ],
    ids=str,
)
def test_a_header_with_a_field_out_of_range_is_damage(place: Path, changes: dict[str, Any]) -> None:
    path = _forge(place, changes, [1, 2, 3])
    with pytest.raises(DamagedBlock):
        block_file.read_header(path)


def test_a_header_that_ends_within_its_tokens_is_damage(place: Path) -> None:
    address = address_of("", blocks.ROOT, "", 0, [1, 2], (), "")
    path = place / f"{address}.block"
    path.write_bytes(blocks.forged(USUAL | {"address": address}, array("i", [1, 2, 3]).tobytes()[:-1]))
    with pytest.raises(DamagedBlock, match="too short"):
        block_file.read_header(path)


def test_negative_tokens_are_damage(place: Path) -> None:
    with pytest.raises(DamagedBlock, match="ids"):
        block_file.read_header(_forge(place, {}, [1, -2, 3]))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"HSBLOCK1",
        bytes(5000),
        b"HSBLOCK2" + bytes(5000),
        b"HSBLOCK1" + bytes(32) + b"\xff" * 5000,
        b"HSBLOCK1" + bytes(32) + b"\x00\x0b\x00\x00" + b"\x91" * 5000,
        b"HSBLOCK1" + bytes(32) + b"\x00\x0b\x00\x00" + b"\xdf\xff\xff\xff\xff" * 1000,
    ],
    ids=["empty", "magic", "zeros", "other-format", "long", "deep", "counts"],
)
def test_rubbish_is_damage(place: Path, content: bytes) -> None:
    path = place / f"{PARENT.address}.block"
    path.write_bytes(content)
    with pytest.raises(DamagedBlock):
        block_file.read_header(path)


def test_a_huge_file_that_was_never_written_is_not_read(place: Path) -> None:
    path = _forge(place, {"data_bytes": MAX_BYTES}, [1, 2, 3], MAX_BYTES)
    with pytest.raises(DamagedBlock, match="never written"):
        block_file.read_header(path)


def _link(path: Path) -> None:
    real = path.with_name("real")
    real.write_bytes(b"x")
    path.symlink_to(real)


@pytest.mark.parametrize(
    "make",
    [os.mkfifo, Path.mkdir, _link, lambda path: path.symlink_to("/dev/zero")],
    ids=["pipe", "folder", "link", "link-to-a-device"],
)
def test_only_regular_files_are_opened_and_nothing_stays_open(
    place: Path, make: Callable[[Path], None]
) -> None:
    block = blocks.write(place, blocks.header(TOKENS))
    block.path.unlink()
    make(block.path)
    before = psutil.Process().num_fds()
    for _ in range(10):
        with pytest.raises(DamagedBlock, match="not a file"):
            block_file.read_header(block.path)
        with pytest.raises(DamagedBlock, match="not a file"):
            block_file.read(block)
    assert psutil.Process().num_fds() == before


def test_a_use_is_noted_and_changes_nothing_else(place: Path) -> None:
    block = blocks.write(place, blocks.header(TOKENS), used=1000)
    assert block_file.read_header(block.path).used == 1000
    before = time.time()
    block_file.touch(block)
    again = block_file.read_header(block.path)
    assert before - 1 <= again.used <= time.time() + 1
    assert replace(again, used=block.used) == block
    assert block_file.read(block) == blocks.content(block.header)


def test_a_full_disk_raises_and_leaves_nothing(tmp_path: Path) -> None:
    if not shutil.which("mount"):
        pytest.skip("there is no mount command")
    with mounted("-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)):
        place = blocks.directory(tmp_path)
        kept = blocks.write(place, blocks.header(TOKENS, sizes=(500_000, 0)))
        for sizes in ((600_000, 0), (0, 600_000), (MAX_TOKENS * 4096, 1)):
            with pytest.raises(OSError, match="No space left") as caught:
                blocks.write(place, blocks.header([1], sizes=sizes))
            assert caught.value.errno == errno.ENOSPC
            assert names(place) == [kept.path.name]
        assert block_file.read(kept) == blocks.content(kept.header)
        blocks.write(place, blocks.header([1], sizes=(400_000, 0)))


def test_a_limit_on_the_size_of_files_raises_and_leaves_nothing(place: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            blocks.write(place, blocks.header(TOKENS, sizes=(60_000, 0)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert names(place) == []


@contextmanager
def _read_only(place: Path) -> Iterator[None]:
    with ExitStack() as stack:
        if os.geteuid() == 0:
            stack.enter_context(mounted("--bind", str(place), str(place)))
            subprocess.run(["mount", "-o", "remount,ro,bind", str(place)], check=True)
        else:
            place.chmod(0o500)
            stack.callback(place.chmod, 0o700)
        yield


def test_a_read_only_directory_raises_and_its_blocks_are_read(place: Path) -> None:
    block = blocks.write(place, blocks.header(TOKENS))
    with _read_only(place):
        with pytest.raises(OSError, match=r"Read-only|denied"):
            blocks.write(place, blocks.header([1]))
        with pytest.raises(OSError, match=r"Read-only|denied"):
            block_file.remove(block)
        block_file.touch(block)
        assert loaded(block.path) == blocks.content(block.header)
    assert names(place) == [block.path.name]


def test_a_directory_that_is_gone_raises(place: Path) -> None:
    place.rmdir()
    with pytest.raises(FileNotFoundError):
        blocks.write(place, blocks.header(TOKENS))


@pytest.mark.slow
def test_after_a_hundred_kills_every_file_is_whole_or_unfinished(tmp_path: Path) -> None:
    command = [sys.executable, block_kills.__file__, str(tmp_path), "100", str(time.time_ns())]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=env, check=False)
    assert done.returncode == 0, done.stderr
    # Some of the kills hit a file that was being written, or this would show nothing.
    assert int(done.stdout) > 0
