"""Disks that are full, small, read-only, locked, copied, and clocks that jump."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path

import httpx
import pytest
from msgspec.structs import replace

from cache_keys import cache_key
from conftest import StartServer
from forkserver import headstart
from headstart.caches.cache_file import format
from headstart.caches.cache_file.format import StatePart
from headstart.caches.cache_file.writer import CacheWriter
from headstart.caches.store import Store
from headstart.names import Namespace
from mounts import mounted
from servers import RunningServer, running_server, said

PROMPT = "You keep the lighthouse.\n\n" + "Each evening you light the lamp. " * 12
LARGE = "And then you climb down the stairs again, one by one. " * 70


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory on a file system of 2 MB."""
    if not shutil.which("mount"):
        pytest.skip("there is no mount command")
    place = tmp_path / "disk"
    place.mkdir()
    with mounted("-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)):
        yield place


def _fill(place: Path, leave: int = 0) -> Path:
    ballast = place / "ballast"
    stat = os.statvfs(place)
    with suppress(OSError), ballast.open("wb", buffering=0) as full:
        full.write(b"x" * max(stat.f_bavail * stat.f_frsize - leave, 0))
    return ballast


def _create(server: RunningServer, name: str, prompt: str) -> httpx.Response:
    return server.post("/v1/cache/toy", cache_name=name, prompt=prompt)


def _code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def _is_as_before(server: RunningServer, expected: str) -> None:
    """The cache "keeper" hits with the text it had, no other is there, and nothing temporary."""
    answer = server.chat("Who?", use_cache="keeper")
    assert answer["usage"]["cache_hit"] is True
    assert said(answer) == expected
    assert [name for name in server.files() if name != "ballast"] == ["toy/keeper.headstart"]


def test_a_full_disk_is_told_and_costs_nothing_that_was_there(small_disk: Path) -> None:
    with running_server(small_disk, "--model", "toy=toy:") as server:
        server.create("keeper", PROMPT)
        expected = said(server.chat("Who?", use_cache="keeper"))
        for leave in (0, 4096, 8192, 16384):
            ballast = _fill(small_disk, leave)
            for name in ("keeper", "new"):
                refused = _create(server, name, LARGE)
                assert _code(refused) == (507, "storage_full"), (leave, refused.text)
                assert refused.headers["x-should-retry"] == "false"
                _is_as_before(server, expected)
            ballast.unlink()
        assert _create(server, "keeper", LARGE).status_code == 200


@pytest.mark.slow
def test_a_server_starts_on_a_full_disk_and_its_caches_hit(small_disk: Path) -> None:
    with running_server(small_disk, "--model", "toy=toy:") as server:
        server.create("keeper", PROMPT)
        expected = said(server.chat("Who?", use_cache="keeper"))
        server.stop()
        _fill(small_disk)
        server.start()
        _is_as_before(server, expected)
        assert _code(_create(server, "new", LARGE)) == (507, "storage_full")
        assert server.http.get("/v1/cache/toy/keeper").json()["would_hit"] is True
        assert server.http.delete("/v1/cache/toy/keeper").status_code == 200


def test_a_limit_on_the_size_of_files_is_told_as_a_full_disk(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Inherited by the server and its worker; what this process writes meanwhile is small.
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        with running_server(tmp_path / "cache", "--model", "toy=toy:eos=0,ctx=30000") as server:
            server.create("keeper", PROMPT)
            expected = said(server.chat("Who?", use_cache="keeper"))
            for name in ("keeper", "new"):
                assert _code(_create(server, name, LARGE * 5)) == (507, "storage_full")
                _is_as_before(server, expected)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def _read_only(directory: Path) -> Iterator[None]:
    """As if the disk had been mounted read-only; modes do that for who isn't root."""
    with ExitStack() as stack:
        if os.geteuid() == 0:
            stack.enter_context(mounted("--bind", str(directory), str(directory)))
            subprocess.run(["mount", "-o", "remount,ro,bind", str(directory)], check=True)
        else:
            for place in (directory, directory / "toy"):
                place.chmod(0o500)
                stack.callback(place.chmod, 0o700)
        yield


def test_a_directory_that_becomes_read_only_is_told_and_old_caches_hit(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    server.create("keeper", PROMPT)
    expected = said(server.chat("Who?", use_cache="keeper"))
    with _read_only(server.cache_dir):
        for name in ("keeper", "new"):
            assert _code(_create(server, name, LARGE)) == (500, "storage_error")
            _is_as_before(server, expected)
        assert _code(server.http.delete("/v1/cache/toy/keeper")) == (500, "storage_error")
        _is_as_before(server, expected)
    assert _create(server, "keeper", LARGE).status_code == 200


@pytest.mark.skipif(os.geteuid() != 0, reason="modes, unlike a mount, are refused at start (test below)")
def test_a_server_on_a_read_only_disk_serves_what_is_there(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    server.create("keeper", PROMPT)
    expected = said(server.chat("Who?", use_cache="keeper"))
    for crashed in (False, True):
        server.stop(signal.SIGKILL if crashed else signal.SIGTERM)
        with _read_only(server.cache_dir):
            server.start()
            _is_as_before(server, expected)
            assert _code(_create(server, "new", LARGE)) == (500, "storage_error")
            assert "can't be written" in server.log.read_text()
            second = _started(server.cache_dir)
            assert second.returncode == 1
            assert "Another Headstart server" in second.stderr
            server.stop()
        server.start()


def _started(directory: Path) -> subprocess.CompletedProcess[str]:
    return headstart("serve", "--port", "0", "--cache-dir", str(directory), "--model", "toy=toy:")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write whatever modes say")
def test_a_directory_that_may_not_be_written_is_refused_at_start(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o500)
    done = _started(tmp_path / "cache")
    assert done.returncode == 1
    assert "Permission denied" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_index_that_can_not_be_opened_costs_no_start(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    server.create("keeper", PROMPT)
    expected = said(server.chat("Who?", use_cache="keeper"))
    server.stop()
    for index in server.cache_dir.glob("index.sqlite*"):
        index.unlink()
    (server.cache_dir / "index.sqlite").mkdir()
    server.start()
    answer = server.chat("Who?", use_cache="keeper")
    assert answer["usage"]["cache_hit"] is True
    assert said(answer) == expected


@pytest.mark.parametrize("seconds", [-4e9, -1e6, 1e6, 4e9])
def test_clocks_that_were_wrong_do_no_harm(start_server: StartServer, seconds: float) -> None:
    server = start_server("--model", "toy=toy:")
    server.create("keeper", PROMPT)
    expected = said(server.chat("Who?", use_cache="keeper"))
    server.stop()
    then = time.time() + seconds
    _rewrite(server.cache_dir, then)
    server.start()
    for _ in range(2):
        answer = server.chat("Who?", use_cache="keeper")
        assert answer["usage"]["cache_hit"] is True
        assert said(answer) == expected
    shown = server.http.get("/v1/cache/toy/keeper").json()
    assert abs(_seconds(shown["updated"]) - then) < 1
    listed = headstart("cache", "list", "--url", server.url)
    assert listed.returncode == 0, listed.stderr
    assert server.create("keeper", LARGE)["version"] == 2
    assert abs(_seconds(server.http.get("/v1/cache/toy/keeper").json()["updated"]) - time.time()) < 60


def _seconds(iso: str) -> float:
    return datetime.fromisoformat(iso).timestamp()


def _rewrite(directory: Path, then: float) -> None:
    """The cache "keeper" as if it had been written and used at that time."""

    async def rewrite(store: Store) -> None:
        entry = store.find(cache_key("toy", "keeper"))
        path = store.path(cache_key("toy", "keeper"))
        tokens = format.verify(path, entry.identity)
        moved = replace(entry, created=then, updated=then)
        with store.scratch(Namespace("toy")) as scratch:
            writer = CacheWriter(scratch, moved, tokens)
            for form, stored in entry.forms.items():
                writer.copy(form, StatePart(tokens[form], path, stored.state_offset, stored.state_bytes))
            await store.put(writer, moved)
        store.index.used(cache_key("toy", "keeper"), then, 0, 0.0)
        os.utime(path, (then, then))

    store = Store(directory)
    asyncio.run(rewrite(store))
    store.close()


def _copied(server: RunningServer, tmp_path: Path) -> Path:
    """As a copy comes over from another machine: other inodes and times, and no lock."""
    copy = tmp_path / "copy"
    shutil.copytree(server.cache_dir, copy, copy_function=shutil.copyfile)
    (copy / ".lock").unlink()
    return copy


def _hits_in(copy: Path, expected: str, start_server: StartServer, **env: str) -> RunningServer:
    server = start_server("--model", "toy=toy:", cache_dir=copy, env=env)
    answer = server.chat("Who?", use_cache="keeper")
    assert answer["usage"]["cache_hit"] is True
    assert said(answer) == expected
    return server


@pytest.mark.parametrize("index", ["copied", "missing", "without its log", "of another directory"])
def test_caches_copied_from_another_machine_hit(
    start_server: StartServer, tmp_path: Path, index: str
) -> None:
    server = start_server("--model", "toy=toy:")
    server.create("keeper", PROMPT)
    expected = said(server.chat("Who?", use_cache="keeper"))
    copy = _copied(server, tmp_path)
    server.stop()
    if index == "missing":
        for part in copy.glob("index.sqlite*"):
            part.unlink()
    elif index == "without its log":
        for part in copy.glob("index.sqlite-*"):
            part.unlink()
    elif index == "of another directory":
        other = start_server("--model", "toy=toy:", cache_dir=tmp_path / "other")
        other.create("stranger", LARGE)
        other.stop()
        for part in copy.glob("index.sqlite*"):
            part.unlink()
        shutil.copy(tmp_path / "other" / "index.sqlite", copy)
    moved = _hits_in(copy, expected, start_server)
    names = [cache["cache_name"] for cache in moved.http.get("/v1/cache").json()["data"]]
    assert names == ["keeper"]


def test_what_was_measured_on_another_cpu_makes_no_copied_cache_unfit(
    start_server: StartServer, tmp_path: Path
) -> None:
    server = start_server("--model", "toy=toy:", env={"HEADSTART_TUNE": "true"})
    server.create("keeper", PROMPT)
    expected = said(server.chat("Who?", use_cache="keeper"))
    copy = _copied(server, tmp_path)
    tunings = copy / "tuning.json"
    if tunings.exists():
        tunings.write_text(tunings.read_text().replace('"cpu": "', '"cpu": "Another '))
    _hits_in(copy, expected, start_server, HEADSTART_TUNE="true")
