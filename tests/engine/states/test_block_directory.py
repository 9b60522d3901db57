"""A process owns a directory of blocks, and finds the usable ones in it."""

from __future__ import annotations

import errno
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import blocks
from headstart.engine.states import block_file
from headstart.engine.states.block_directory import BlockDirectory
from headstart.engine.states.block_file import BlockFile, BlockHeader
from mounts import mounted
from socket_files import make_socket


@pytest.fixture
def own(tmp_path: Path) -> Iterator[BlockDirectory]:
    with BlockDirectory(blocks.directory(tmp_path)) as directory:
        assert directory.acquire()
        yield directory


def names(own: BlockDirectory) -> set[str]:
    return {path.name for path in own.path.iterdir()} - {".lock"}


def file_name(header: BlockHeader) -> str:
    return f"{header.address}.block"


def found(own: BlockDirectory) -> list[BlockHeader]:
    return [block.header for block in own.scan()]


def test_a_directory_is_created_for_its_user_alone(tmp_path: Path) -> None:
    with BlockDirectory(tmp_path / ".states" / "model" / blocks.ROOT[:16]) as own:
        assert own.acquire()
        assert own.path.stat().st_mode & 0o777 == 0o700
        assert own.scan() == []


def test_a_directory_has_one_owner_at_a_time(own: BlockDirectory) -> None:
    with BlockDirectory(own.path) as other:
        assert not other.acquire()
        assert not other.acquire()
        own.close()
        assert other.acquire()
        assert not own.acquire()
    assert own.acquire()


OWNER = """
import sys, time
from pathlib import Path
from headstart.engine.states.block_directory import BlockDirectory
own = BlockDirectory(Path(sys.argv[1]))
print(own.acquire(), flush=True)
time.sleep(60)
"""


def test_the_lock_of_a_dead_process_is_free(tmp_path: Path) -> None:
    place = blocks.directory(tmp_path)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", OWNER, str(place)], stdout=subprocess.PIPE, env=env)
    with process, BlockDirectory(place) as own:
        assert process.stdout
        assert process.stdout.readline() == b"True\n"
        assert not own.acquire()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert own.acquire()


def test_parents_come_before_what_continues_them(own: BlockDirectory) -> None:
    trunk = blocks.write_chain(own.path, list(range(40)))
    written = [*trunk]
    for parent, owner in ((trunk[3], ""), (trunk[3], "alice"), (trunk[-1], "bob")):
        written += blocks.write_chain(own.path, [7, 8, 9, 10, 11], parent, owner=owner)
    headers = found(own)
    assert len(headers) == len(written) == 16
    assert {header.address for header in headers} == {header.address for header in written}
    before = {""}
    for header in headers:
        assert header.parent in before
        before.add(header.address)


def test_unfinished_files_are_removed_and_others_left(own: BlockDirectory) -> None:
    (kept,) = blocks.write_chain(own.path, [1, 2])
    (own.path / f"{kept.address}.01234567.unfinished").write_bytes(b"half")
    (own.path / "x.unfinished").symlink_to("/dev/zero")
    (own.path / "notes.txt").write_bytes(b"mine")
    assert found(own) == [kept]
    assert names(own) == {file_name(kept), "notes.txt"}
    assert own.damaged == 0


def test_what_continues_a_damaged_or_missing_block_goes_with_it(
    own: BlockDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    first = blocks.write_chain(own.path, list(range(20)))
    second = blocks.write_chain(own.path, list(range(100, 120)))
    other = blocks.write_chain(own.path, [5, 5], first[1])
    with (own.path / file_name(first[2])).open("r+b") as file:
        file.write(b"x")
    (own.path / file_name(second[0])).unlink()
    with caplog.at_level(logging.WARNING):
        assert {header.address for header in found(own)} == {each.address for each in (*first[:2], *other)}
    assert own.damaged == 1
    assert file_name(first[2]) in caplog.text
    assert names(own) == {file_name(each) for each in (*first[:2], *other)}
    assert len(found(own)) == 3
    assert own.damaged == 1


def test_a_block_that_begins_elsewhere_than_its_parent_ends_is_removed(own: BlockDirectory) -> None:
    (parent,) = blocks.write_chain(own.path, [1, 2, 3])
    address = block_file.address_of(parent.address, blocks.ROOT, "", 2, [9], (), "")
    blocks.write(own.path, BlockHeader(address, parent.address, blocks.ROOT, 2, "", (), "", [9], 10, 0, 1.0))
    assert found(own) == [parent]
    assert names(own) == {file_name(parent)}


@pytest.mark.slow
def test_damage_anywhere_in_a_directory_never_gives_other_bytes(own: BlockDirectory) -> None:
    """Each of 200 damages is noticed by the scan or by reading."""
    rng = random.Random(7)
    written = blocks.write_chain(own.path, list(range(12)))
    whole = {header.address: (own.path / file_name(header)).read_bytes() for header in written}
    for _ in range(200):
        for address, content in whole.items():
            (own.path / f"{address}.block").write_bytes(content)
        victim = rng.choice(written)
        with (own.path / file_name(victim)).open("r+b") as file:
            at = rng.randrange(len(whole[victim.address]))
            file.seek(at)
            file.write(bytes([whole[victim.address][at] ^ rng.randrange(1, 256)]))
        failed = set(whole)
        for block in own.scan():
            try:
                assert block_file.read(block) == blocks.content(block.header)
            except block_file.DamagedBlock:
                assert block.header.address == victim.address
            else:
                failed.remove(block.header.address)
        expected = {each.address for each in written if each.start >= victim.start}
        assert victim.address in failed
        assert failed in ({victim.address}, expected)


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


HOSTILE: dict[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "socket": make_socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "nowhere": lambda path: path.symlink_to("/no/such/file"),
    "loop": lambda path: path.symlink_to(path.name),
    "sparse": _sparse,
    "empty": Path.touch,
}


def test_whatever_is_named_as_a_block_is_never_waited_for_and_removed(
    own: BlockDirectory, tmp_path: Path
) -> None:
    chain = blocks.write_chain(own.path, list(range(8)))
    elsewhere = tmp_path / "elsewhere"
    shutil.copy(own.path / file_name(chain[0]), elsewhere)
    made = [*HOSTILE.values(), lambda path: path.symlink_to(elsewhere), Path.mkdir]
    for number, make in enumerate(made):
        make(own.path / file_name(blocks.header([number])))
        make(own.path / f"{number}.unfinished")
    (own.path / os.fsdecode(b"\xff\n.block")).touch()
    before = psutil.Process().num_fds()
    for _ in range(3):
        assert found(own) == chain
    assert psutil.Process().num_fds() == before
    # Folders hold what nobody but their maker knows.
    folders = {file_name(blocks.header([len(made) - 1])), f"{len(made) - 1}.unfinished"}
    assert names(own) == {file_name(header) for header in chain} | folders
    assert elsewhere.exists()


def test_a_process_without_room_for_open_files_removes_nothing(
    own: BlockDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = blocks.write_chain(own.path, list(range(40)))
    read_header = block_file.read_header

    def without_room(path: Path) -> BlockFile:
        if path.name == file_name(chain[3]):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
        return read_header(path)

    with monkeypatch.context() as patched:
        patched.setattr(block_file, "read_header", without_room)
        with pytest.raises(OSError, match="Too many open files"):
            own.scan()
    assert found(own) == chain


def test_a_directory_on_a_read_only_disk_is_scanned(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    place = blocks.directory(tmp_path)
    chain = blocks.write_chain(place, list(range(8)))
    (place / "x.unfinished").touch()
    with mounted("--bind", str(place), str(place)):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(place)], check=True)
        with BlockDirectory(place) as own:
            assert own.acquire()
            assert found(own) == chain
            with pytest.raises(OSError, match="Read-only"):
                own.remove(own.scan())
            assert found(own) == chain


@pytest.mark.parametrize(
    "make", [Path.mkdir, lambda path: path.symlink_to("/dev/zero")], ids=["folder", "link"]
)
def test_a_lock_that_is_no_file_raises(tmp_path: Path, make: Callable[[Path], None]) -> None:
    place = blocks.directory(tmp_path)
    make(place / ".lock")
    with BlockDirectory(place) as own, pytest.raises(OSError, match=r"directory|symbolic links"):
        own.acquire()


def test_a_failed_removal_does_not_keep_others(own: BlockDirectory) -> None:
    chain = blocks.write_chain(own.path, list(range(12)))
    scanned = own.scan()
    scanned[1].path.unlink()
    scanned[1].path.mkdir()
    with pytest.raises(OSError, match=scanned[1].path.name):
        own.remove(scanned[::-1])
    assert names(own) == {file_name(chain[1])}
