"""`headstart cache verify`: every cache checked, and repaired without losing anything."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from conftest import StartServer
from headstart.cli.main import app
from servers import Json, RunningServer, said

PROMPT = "You keep the lighthouse. " + "Each evening you light the lamp. " * 12
NOBODY = "http://127.0.0.1:1"


def _verify(*arguments: str, url: str = NOBODY, models: str = '{"toy": "toy:"}') -> Result:
    environment = {"HEADSTART_URL": url, "HEADSTART_MODELS": models, "COLUMNS": "200"}
    return CliRunner().invoke(app, ["cache", "verify", *arguments], env=environment)


def _shown(server: RunningServer, name: str) -> Json:
    answer: Json = server.http.get(f"/v1/cache/toy/{name}").json()
    return answer


def _flip(path: Path, offset: int) -> None:
    """Damage that leaves the file's length and time as they were, as a disk would."""
    stat = path.stat()
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.fixture
def server(start_server: StartServer) -> RunningServer:
    server = start_server("--model", "toy=toy:")
    for name in ("one", "two", "three"):
        server.create(name, f"{name}: {PROMPT}")
    return server


def _file(server: RunningServer, name: str) -> Path:
    return server.cache_dir / "toy" / f"{name}.headstart"


def test_caches_that_are_whole_are_said_to_be(server: RunningServer) -> None:
    result = _verify(url=server.url)
    assert result.exit_code == 0, result.output
    assert "one of toy: ok\n" in result.stdout
    assert f"Verified 3 caches in the server at {server.url}: 3 ok" in result.stdout


def test_one_cache_of_one_model_can_be_verified_alone(server: RunningServer) -> None:
    result = _verify("two", "--model", "toy", url=server.url)
    assert result.exit_code == 0
    assert "Verified 1 caches" in result.stdout
    missing = _verify("four", url=server.url)
    assert missing.exit_code == 1
    assert "There is no cache 'four'" in missing.stderr


@pytest.mark.parametrize("running", [True, False])
def test_damage_is_found_also_where_size_and_time_are_as_they_were(
    server: RunningServer, running: bool
) -> None:
    assert _shown(server, "one")["would_hit"] is True
    _flip(_file(server, "one"), -5)
    if not running:
        server.stop()
    arguments = [] if running else ["--cache-dir", str(server.cache_dir)]
    result = _verify(*arguments, url=server.url if running else NOBODY)
    assert result.exit_code == 1
    assert "one of toy: damaged" in result.stdout
    assert "wrong hash of" in result.stdout
    assert "two of toy: ok" in result.stdout
    assert "2 ok" in result.stdout
    assert "1 damaged" in result.stdout


def test_what_is_damaged_is_computed_again_and_hits(server: RunningServer) -> None:
    expected = said(server.chat("Who?", use_cache="one"))
    _flip(_file(server, "one"), -5)
    path = _file(server, "two")
    path.write_bytes(path.read_bytes()[:-100])
    result = _verify("--repair", url=server.url)
    assert result.exit_code == 0, result.output
    assert "2 damaged" in result.stdout
    assert "2 repaired" in result.stdout
    for name in ("one", "two"):
        assert server.chat("Who?", use_cache=name)["usage"]["cache_hit"] is True
        assert _shown(server, name)["version"] == 1
    assert said(server.chat("Who?", use_cache="one")) == expected
    assert _verify(url=server.url).exit_code == 0


def test_caches_that_no_longer_fit_are_found_and_computed_again(
    server: RunningServer, start_server: StartServer
) -> None:
    server.stop()
    changed = start_server("--model", "toy=toy:weights=other")
    shown = _shown(changed, "one")
    assert (shown["would_hit"], shown["miss_reason"]) == (False, "model_changed")
    found = _verify(url=changed.url)
    assert found.exit_code == 1
    assert "one of toy: unfit (the weights are others)" in found.stdout
    assert _verify("--repair", url=changed.url).exit_code == 0
    shown = _shown(changed, "one")
    assert (shown["would_hit"], shown["miss_reason"]) == (True, None)


def test_without_a_server_it_is_judged_by_the_settings(server: RunningServer) -> None:
    server.stop()
    arguments = ["--cache-dir", str(server.cache_dir)]
    before = {path: path.read_bytes() for path in server.cache_dir.rglob("*.headstart")}
    assert _verify(*arguments).exit_code == 0
    other = _verify(*arguments, models='{"toy": "toy:weights=other"}')
    assert other.exit_code == 1
    assert "the weights are others" in other.stdout
    unknown = _verify(*arguments, models='{"another": "toy:"}')
    assert unknown.exit_code == 0
    assert "the settings have no such model" in unknown.stdout
    assert {path: path.read_bytes() for path in server.cache_dir.rglob("*.headstart")} == before


def test_repairing_needs_a_server_and_says_so(tmp_path: Path) -> None:
    result = _verify("--repair", "--cache-dir", str(tmp_path))
    assert result.exit_code == 1
    assert "--repair needs a running server" in result.stderr
    nothing = _verify("--cache-dir", str(tmp_path / "absent"))
    assert nothing.exit_code == 1
    assert "neither a server nor a cache directory" in nothing.stderr


def test_a_file_that_lost_its_end_keeps_its_prompt_also_without_an_index(server: RunningServer) -> None:
    expected = said(server.chat("Who?", use_cache="one"))
    server.stop()
    path = _file(server, "one")
    path.write_bytes(path.read_bytes()[:-400])
    for index in server.cache_dir.glob("index.sqlite*"):
        index.unlink()
    server.start()
    assert [cache["cache_name"] for cache in server.http.get("/v1/cache").json()["data"]] == [
        "one",
        "three",
        "two",
    ]
    assert _shown(server, "one")["miss_reason"] == "corrupt"
    answer = server.chat("Who?", use_cache="one")
    assert answer["usage"]["cache_miss_reason"] == "corrupt"
    assert said(answer) == expected
    assert server.chat("Who?", use_cache="one")["usage"]["cache_hit"] is True


def _unreadable(server: RunningServer) -> Path:
    """A file from which nothing can be read, nor does the index know of it."""
    path = server.cache_dir / "toy" / "lost.headstart"
    path.write_bytes(b"\x00" * 1000)
    return path


def test_a_file_with_no_readable_prompt_is_set_aside_and_never_deleted_silently(
    server: RunningServer,
) -> None:
    path = _unreadable(server)
    found = _verify(url=server.url)
    assert found.exit_code == 1
    assert "lost of toy: damaged" in found.stdout
    assert path.exists()
    repaired = _verify("--repair", url=server.url)
    assert repaired.exit_code == 1
    assert "set aside" in repaired.stdout
    assert "lost.headstart.damaged" in repaired.stdout
    assert not path.exists()
    assert path.with_name("lost.headstart.damaged").read_bytes() == b"\x00" * 1000
    assert _verify(url=server.url).exit_code == 0
    again = _unreadable(server)
    again.write_bytes(b"\x01" * 1000)
    _verify("--repair", url=server.url)
    assert path.with_name("lost.headstart.damaged").read_bytes() == b"\x00" * 1000
    assert path.with_name("lost.headstart.damaged-1").read_bytes() == b"\x01" * 1000


def test_such_a_file_is_deleted_where_that_is_asked_for(server: RunningServer) -> None:
    path = _unreadable(server)
    assert _verify("--remove-unreadable", url=server.url).exit_code == 2
    result = _verify("--repair", "--remove-unreadable", url=server.url)
    assert result.exit_code == 0
    assert "lost of toy: damaged, removed" in result.stdout
    assert not list(path.parent.glob("lost*"))


def test_a_file_named_after_another_cache_is_told_and_left_alone(server: RunningServer) -> None:
    copied = server.cache_dir / "toy" / "copy.headstart"
    shutil.copy(_file(server, "one"), copied)
    result = _verify("--repair", "--remove-unreadable", url=server.url)
    assert result.exit_code == 1
    assert "copy of toy: stray" in result.stdout
    assert copied.read_bytes() == _file(server, "one").read_bytes()


def test_a_cache_of_a_model_that_is_not_served_is_checked_but_not_repaired(
    server: RunningServer, start_server: StartServer
) -> None:
    server.stop()
    other = start_server("--model", "other=toy:")
    answer = other.post("/v1/verify").json()
    assert {(verdict["state"], verdict["would_hit"]) for verdict in answer["data"]} == {("ok", None)}
    _flip(_file(server, "one"), -5)
    answer = other.post("/v1/verify", model="toy", cache_name="one", repair=True).json()
    (verdict,) = answer["data"]
    assert (verdict["state"], verdict["action"]) == ("damaged", "failed")
    assert (answer["wrong"], answer["repaired"]) == (1, 0)


def test_a_cache_that_is_shown_says_whether_it_would_hit(server: RunningServer) -> None:
    shown = _shown(server, "one")
    assert (shown["would_hit"], shown["miss_reason"]) == (True, None)
    environment = {"HEADSTART_URL": server.url, "COLUMNS": "80"}
    assert "Would hit" in CliRunner().invoke(app, ["cache", "show", "one"], env=environment).stdout
    data = bytearray(_file(server, "one").read_bytes())
    data[-1] ^= 1
    _file(server, "one").write_bytes(data)
    shown = _shown(server, "one")
    assert (shown["would_hit"], shown["miss_reason"]) == (False, "corrupt")
    told = CliRunner().invoke(app, ["cache", "show", "one", "--json"], env=environment).stdout
    assert json.loads(told)["miss_reason"] == "corrupt"
    assert "no: corrupt" in CliRunner().invoke(app, ["cache", "show", "one"], env=environment).stdout


def test_verifying_beside_requests_that_replace_and_delete_finds_nothing_wrong(server: RunningServer) -> None:
    over = threading.Event()

    def change() -> None:
        number = 0
        while not over.is_set():
            number += 1
            server.create("one", f"{number} {PROMPT}")
            server.http.delete("/v1/cache/toy/two")
            server.create("two", f"{number} {PROMPT}")

    changing = threading.Thread(target=change)
    changing.start()
    try:
        answers = [server.post("/v1/verify") for _ in range(40)]
    finally:
        over.set()
        changing.join()
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.json()["wrong"] for answer in answers} == {0}
