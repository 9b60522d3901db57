"""Whatever lies where a file should be: nothing waits for it, nothing stays open, and it is told."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from conftest import StartServer
from forkserver import headstart
from headers import changed, header_of, with_entry
from headstart.regular_files import NotAFile, open_file
from servers import Json, RunningServer, eventually, said
from socket_files import make_socket

PROMPT = "You keep the lighthouse and never sleep. " * 8
TERA = 1 << 40


def _device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))
    except PermissionError:
        path.symlink_to("/dev/zero")


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(TERA)


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _unreadable(path: Path) -> None:
    path.write_bytes(b"rubbish")
    path.chmod(0)


KINDS: dict[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "socket": make_socket,
    "device": _device,
    "link-to-a-device": lambda path: path.symlink_to("/dev/zero"),
    "link-to-nothing": lambda path: path.symlink_to("/no/such/file"),
    "loop": _loop,
    "sparse": _sparse,
    "unreadable": _unreadable,
    "empty": Path.touch,
}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("sparse", "unreadable", "empty")])
@pytest.mark.parametrize("follow", [False, True])
def test_only_regular_files_are_opened_and_nothing_stays_open(
    tmp_path: Path, kind: str, follow: bool
) -> None:
    path = tmp_path / "x"
    KINDS[kind](path)
    before = _handles_of(path)
    for _ in range(10):
        with pytest.raises(OSError if (follow and "link" in kind) or kind == "loop" else NotAFile):
            open_file(path, follow=follow)
    assert _handles_of(path) <= before


def _handles_of(path: Path) -> set[str]:
    """The handles that this process has of it, or of what it links to. Those of other files may be closed at
    any time: by another thread, or with an object that is collected."""
    wanted, found = set(), set()
    for look in (os.lstat, os.stat):
        with suppress(OSError):
            wanted.add(look(path)[1:3])
    for handle in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            if handle.stat()[1:3] in wanted:
                found.add(handle.name)
    return found


def test_a_handle_of_a_regular_file_is_counted_while_it_is_open(tmp_path: Path) -> None:
    """Else the test above would see nothing that stays open."""
    path = tmp_path / "x"
    path.touch()
    with open_file(path) as file:
        assert _handles_of(path) == {str(file.fileno())}
    assert _handles_of(path) == set()


@pytest.fixture
def strange(start_server: StartServer) -> RunningServer:
    """A server that was started on a directory with a good cache and one of everything else."""
    server = start_server("--model", "toy=toy:")
    server.create("good", PROMPT)
    whole = (server.cache_dir / "toy" / "good.headstart").read_bytes()
    server.stop()
    namespace = server.cache_dir / "toy"
    for kind, make in KINDS.items():
        make(namespace / f"{kind}.headstart")
        make(namespace / f"{kind}.rkllm_cache")
        make(server.cache_dir / f"{kind}-shelf")
    (server.cache_dir / "linked").symlink_to(namespace)
    for name in ("with\nline", "\x1b[31mred", "x" * 200, ".hidden", "a b", "-"):
        (namespace / f"{name}.headstart").write_bytes(with_entry(whole, name=name))
    (namespace / os.fsdecode(b"latin-\xe9.headstart")).write_bytes(whole)
    (server.cache_dir / os.fsdecode(b"shelf-\xe9")).mkdir()
    (server.cache_dir / os.fsdecode(b"shelf-\xe9") / "x.headstart").write_bytes(b"rubbish")
    (server.cache_dir / "toy@\x07").mkdir()
    (server.cache_dir / "toy@\x07" / "x.headstart").write_bytes(with_entry(whole, name="x", owner="\x07"))
    server.start()
    return server


def doctor(server: RunningServer) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "headstart", "doctor", "--cache-dir", str(server.cache_dir)]
    return subprocess.run(
        [*command, *server.flags], capture_output=True, text=True, timeout=120, env=server.env, check=False
    )


def verify_offline(server: RunningServer) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "headstart", "cache", "verify", "--cache-dir", str(server.cache_dir)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=server.env, check=False)


@pytest.mark.slow
def test_a_directory_of_strange_files_is_started_on_listed_and_verified(strange: RunningServer) -> None:
    expected = said(strange.chat("Who?", system=PROMPT, cache_prompt=False))
    for _ in range(2):
        answer = strange.chat("Who?", use_cache="good")
        assert said(answer) == expected
        assert answer["usage"]["cache_hit"] is True
        listed = strange.http.get("/v1/cache").json()["data"]
        assert [cache["cache_name"] for cache in listed] == ["good"]
        verdicts = strange.post("/v1/verify").json()["data"]
        states = {(each["model"], each["cache_name"]): each["state"] for each in verdicts}
        assert states["toy", "good"] == "ok"
        assert {kind for kind in KINDS if states["toy", kind] == "damaged"} >= KINDS.keys() - {"unreadable"}
        assert {states["toy", name] for name in ("with\\nline", "\\x1b[31mred", "latin-\\xe9", "a b")} == {
            "stray"
        }
        for kind in KINDS:
            named = strange.post("/v1/chat/completions", model="toy", messages=[], use_cache=kind)
            assert named.status_code in (400, 404)
            assert strange.http.get(f"/v1/cache/toy/{kind}").status_code == 404
            assert strange.http.get(f"/v1/cache/toy/{kind}/file").status_code == 404
        strange.restart()
    assert "pipe.headstart: it is a named pipe, not a file" in strange.log.read_text()


@pytest.mark.slow
def test_doctor_and_the_offline_check_tell_of_strange_files_and_end(strange: RunningServer) -> None:
    told = doctor(strange)
    assert "Traceback" not in told.stdout + told.stderr
    assert "pipe.headstart: it is a named pipe, not a file" in " ".join(told.stdout.split())
    told = verify_offline(strange)
    assert told.returncode == 1
    assert "Traceback" not in told.stdout + told.stderr
    assert "good" in told.stdout


def test_no_handle_stays_open_after_a_hundred_looks(strange: RunningServer) -> None:
    def handles() -> int:
        return psutil.Process(strange.process.pid).num_fds()

    def look() -> None:
        strange.http.get("/v1/cache")
        strange.http.get("/v1/cache/toy/folder")
        strange.chat("Who?", max_tokens=1)

    look()
    before = handles()
    for _ in range(100):
        look()
    strange.post("/v1/verify")
    # Its index is written meanwhile.
    eventually(lambda: handles() <= before + 2)


def test_repair_sets_them_aside_and_deletes_nothing(strange: RunningServer) -> None:
    verdicts = strange.post("/v1/verify", repair=True).json()["data"]
    # The folder that is linked holds the same files, and its turn comes first.
    aside = {each["cache_name"] for each in verdicts if each["action"] == "set_aside"}
    assert aside >= {"pipe", "folder", "socket", "device", "loop", "sparse", "empty"}
    kept = strange.cache_dir / "toy" / "pipe.headstart.damaged"
    assert stat.S_ISFIFO(kept.stat().st_mode)
    assert strange.chat("Who?", use_cache="good")["usage"]["cache_hit"] is True


def test_creating_and_deleting_where_something_else_lies_says_so_or_works(strange: RunningServer) -> None:
    for kind in KINDS:
        response = strange.post("/v1/cache/toy", cache_name=kind, prompt=PROMPT)
        if kind == "folder":
            assert response.json()["error"]["code"] == "storage_error"
            continue
        assert response.status_code == 200, response.text
        assert strange.chat("Who?", use_cache=kind)["usage"]["cache_hit"] is True
        assert strange.http.delete(f"/v1/cache/toy/{kind}").status_code == 200
    # A folder where a state would lie is in nobody's way.
    strange.create("beside", PROMPT)
    (strange.cache_dir / "toy" / "beside.rkllm_cache").mkdir()
    assert strange.http.delete("/v1/cache/toy/beside").status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pipe", "folder", "socket", "device", "loop", "link-to-nothing"])
@pytest.mark.parametrize("place", ["model", "template", "config", "prompt", "key", "models-dir", "lock"])
def test_a_start_with_something_else_than_a_file_says_so_and_ends(
    tmp_path: Path, kind: str, place: str
) -> None:
    strange = tmp_path / "strange.gguf"
    KINDS[kind](strange)
    cache = tmp_path / "cache"
    (cache / "toy").mkdir(parents=True)
    config = tmp_path / "headstart.toml"
    config.touch()
    arguments = ["--model", "toy=toy:", "--config", str(config)]
    match place:
        case "model":
            arguments[1] = f"toy={strange}"
        case "template":
            config.write_text(f'templates = {{toy = "{strange}"}}')
        case "config":
            arguments[3] = str(strange)
        case "prompt":
            config.write_text(f'[caches.x]\nfile = "{strange}"')
        case "key":
            config.write_text(f'[keys.x]\nkey_file = "{strange}"')
        case "models-dir":
            arguments = ["--models-dir", str(tmp_path), "--config", str(config)]
        case "lock":
            strange.rename(cache / ".lock")
    if place == "lock" and kind in ("pipe", "device"):
        pytest.skip("a lock is a lock whatever it is taken on")
    ended = headstart("serve", "--port", "0", "--cache-dir", str(cache), *arguments)
    assert ended.returncode == 1, ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("headstart: ")


def test_weights_that_were_never_written_are_not_hashed(tmp_path: Path) -> None:
    weights = tmp_path / "huge.gguf"
    _sparse(weights)
    ended = headstart("serve", "--port", "0", "--cache-dir", str(tmp_path / "c"), "--model", f"m={weights}")
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr


def test_a_state_as_large_as_no_disk_is_not_read(start_server: StartServer) -> None:
    """Neither for whom names it, nor for those who begin like it, nor to be verified."""
    server = start_server("--model", "toy=toy:")
    server.create("good", PROMPT)
    path = server.cache_dir / "toy" / "good.headstart"

    def grow(header: Json) -> None:
        (last,) = [name for name in header if header[name].get("data_offsets", [0, 0])[1] == end]
        begin, _ = header[last]["data_offsets"]
        header[last] |= {"shape": [TERA], "data_offsets": [begin, begin + TERA]}

    whole = path.read_bytes()
    end = max(tensor["data_offsets"][1] for name, tensor in header_of(whole).items() if name[0] != "_")
    grown = changed(whole, grow)
    with path.open("wb") as file:
        file.write(grown)
        size = int.from_bytes(grown[:8], "little") + 8
        file.truncate(size + max(t["data_offsets"][1] for n, t in header_of(grown).items() if n[0] != "_"))
    (verdict,) = server.post("/v1/verify").json()["data"]
    assert verdict["state"] == "damaged"
    assert "most of it was never written" in verdict["detail"]
    prompt = {"prompt": PROMPT + "Who?", "max_tokens": 1}
    answer = server.post("/v1/completions", model="toy", use_cache="good", **prompt).json()
    assert answer["usage"]["cache_miss_reason"] == "corrupt"


def test_a_header_of_many_brackets_is_damage(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    server.create("good", PROMPT)
    path = server.cache_dir / "toy" / "deep.headstart"
    whole = (server.cache_dir / "toy" / "good.headstart").read_bytes()
    brackets = b"[" * 200_000
    contents = [
        len(brackets).to_bytes(8, "little") + brackets,
        changed(whole, lambda header: header["__metadata__"].update(entry=brackets.decode())),
        changed(
            whole, lambda header: header["__metadata__"].update(entry='{"messages":[' + '{"a":' * 200_000)
        ),
    ]
    for content in contents:
        path.write_bytes(content)
        assert len(server.http.get("/v1/cache").json()["data"]) == 1
        states = {each["cache_name"]: each["state"] for each in server.post("/v1/verify").json()["data"]}
        assert states == {"good": "ok", "deep": "damaged"}
        server.restart()
        assert "deep.headstart" in server.log.read_text()
        told = doctor(server)
        assert "Traceback" not in told.stderr
        assert "deep.headstart" in told.stdout
