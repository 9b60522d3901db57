"""Caches as files: out of one server, into another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from conftest import StartServer
from headstart.caches.cache_file import format
from headstart.caches.cache_file import header as header_of_file
from headstart.caches.cache_file.validate import read_intact
from headstart.cli.main import app
from servers import Json, RunningServer, said

PROMPT = "You keep the lighthouse and never sleep. " * 8


def headstart(*arguments: str, url: str) -> Result:
    return CliRunner().invoke(app, arguments, env={"HEADSTART_URL": url, "COLUMNS": "80"})


def exported(server: RunningServer, name: str) -> bytes:
    response = server.http.get(f"/v1/cache/toy/{name}/file")
    assert response.status_code == 200, response.text
    return response.content


def put(server: RunningServer, name: str, content: Any, **query: Any) -> httpx.Response:
    return server.http.put(f"/v1/cache/toy/{name}/file", content=content, params=query)


def shown(server: RunningServer, name: str) -> Json:
    response = server.http.get(f"/v1/cache/toy/{name}")
    assert response.status_code == 200, response.text
    answer: Json = response.json()
    return answer


def refused(response: httpx.Response, status: int, code: str) -> Json:
    error: Json = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code), response.text
    return error


def rewritten(whole: bytes, change: Any) -> bytes:
    """The file with a changed header and a right hash of it."""
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    change(header)
    header["__metadata__"]["blake3"] = "0" * 64
    text = header_of_file.hashed(json.dumps(header).encode())
    return len(text).to_bytes(8, "little") + text + whole[8 + length :]


def test_an_export_is_the_whole_file_and_says_what_it_is(toy: RunningServer) -> None:
    toy.create("exp-out", PROMPT)
    response = toy.http.get("/v1/cache/toy/exp-out/file")
    path = toy.cache_dir / "toy" / "exp-out.headstart"
    assert response.content == path.read_bytes()
    assert response.headers["content-type"] == "application/octet-stream"
    assert response.headers["content-disposition"] == 'attachment; filename="exp-out.headstart"'
    assert response.headers["content-length"] == str(len(response.content))
    with format.open_file(path) as opened:
        digest = header_of_file.read_header(opened).metadata["blake3"]
    assert response.headers["etag"] == f'"{digest}"'


def test_who_has_the_file_already_need_not_get_it_again(toy: RunningServer) -> None:
    toy.create("exp-tag", PROMPT)
    tag = toy.http.get("/v1/cache/toy/exp-tag/file").headers["etag"]
    again = toy.http.get("/v1/cache/toy/exp-tag/file", headers={"if-none-match": tag})
    assert (again.status_code, again.content) == (304, b"")
    toy.create("exp-tag", "other " + PROMPT)
    assert toy.http.get("/v1/cache/toy/exp-tag/file", headers={"if-none-match": tag}).status_code == 200


@pytest.mark.slow
def test_a_file_goes_into_another_server_and_hits_there(start_server: StartServer, tmp_path: Path) -> None:
    one = start_server("--model", "toy=toy:", cache_dir=tmp_path / "one")
    two = start_server("--model", "toy=toy:", cache_dir=tmp_path / "two")
    one.create("exp", PROMPT, description="d", metadata={"a": "b"}, pinned=True)
    response = put(two, "other-name", exported(one, "exp"))
    assert response.status_code == 200, response.text
    made = response.json()
    assert (made["object"], made["cache_name"], made["version"]) == ("cache.created", "other-name", 1)
    there = shown(two, "other-name")
    assert (there["prompt"], there["description"], there["metadata"], there["pinned"]) == (
        *(PROMPT, "d", {"a": "b"}, True),
    )
    answer = two.chat("Hi", use_cache="other-name")
    assert answer["usage"]["cache_hit"] is True
    assert answer["timings"]["cache_source"] == "file"
    assert said(answer) == said(one.chat("Hi", use_cache="exp"))
    two.restart()
    assert shown(two, "other-name") == there | {
        name: shown(two, "other-name")[name]
        for name in ("hits", "last_used", "tokens_saved", "seconds_saved")
    }


def test_a_file_for_a_name_that_exists_makes_a_new_version(toy: RunningServer) -> None:
    toy.create("exp-v", PROMPT)
    whole = exported(toy, "exp-v")
    toy.create("exp-v", "other " + PROMPT)
    made = put(toy, "exp-v", whole).json()
    assert (made["object"], made["version"]) == ("cache.updated", 3)
    assert shown(toy, "exp-v")["prompt"] == PROMPT
    refused(put(toy, "exp-v", whole, allow_overwrite=False), 409, "cache_conflict")


def test_a_file_larger_than_a_body_may_be_is_taken(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:", env={"HEADSTART_MAX_BODY_MB": "0.01"})
    server.create("large", PROMPT * 10)
    whole = exported(server, "large")
    assert len(whole) > 10_486
    pieces = (whole[at : at + 1000] for at in range(0, len(whole), 1000))
    assert put(server, "copy", pieces).status_code == 200
    assert server.chat("Hi", use_cache="copy")["usage"]["cache_hit"] is True


def test_states_of_another_model_are_refused_with_the_reason(
    start_server: StartServer, tmp_path: Path
) -> None:
    other = start_server("--model", "toy=toy:weights=other", cache_dir=tmp_path / "other")
    server = start_server("--model", "toy=toy:", cache_dir=tmp_path / "here")
    other.create("exp", PROMPT, description="d")
    whole = exported(other, "exp")
    error = refused(put(server, "exp", whole), 409, "cache_mismatch")
    assert error["reason"] == "model_changed"
    assert "the weights are others" in error["message"]
    assert server.files() == []
    made = put(server, "exp", whole, rebuild=True)
    assert made.status_code == 200, made.text
    assert (shown(server, "exp")["prompt"], shown(server, "exp")["description"]) == (PROMPT, "d")
    assert server.chat("Hi", use_cache="exp")["usage"]["cache_hit"] is True


@pytest.mark.parametrize(
    "content",
    [b"", b"rubbish" * 1000, (1 << 40).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"{}"],
    ids=["empty", "rubbish", "too-long", "no-header"],
)
def test_what_is_no_file_of_a_cache_is_refused(toy: RunningServer, content: bytes) -> None:
    refused(put(toy, "exp-none", content), 400, "damaged_file")
    assert toy.http.get("/v1/cache/toy/exp-none").status_code == 404
    assert not [name for name in toy.files() if ".tmp-" in name]


def test_damage_at_any_place_is_refused(toy: RunningServer) -> None:
    toy.create("exp-whole", PROMPT)
    whole = exported(toy, "exp-whole")
    for at in range(0, len(whole), len(whole) // 23):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        refused(put(toy, "exp-damaged", bytes(damaged)), 400, "damaged_file")
    refused(put(toy, "exp-damaged", whole[:-1]), 400, "damaged_file")
    refused(put(toy, "exp-damaged", whole + b"x"), 400, "damaged_file")


def _shape(header: Json) -> None:
    header["chat.tokens"]["shape"] = [2**62]


def _overlap(header: Json) -> None:
    header["chat.state"]["data_offsets"] = [0, header["chat.state"]["data_offsets"][1]]


def _negative(header: Json) -> None:
    header["chat.tokens"]["data_offsets"] = [-8, 8]


def _no_state(header: Json) -> None:
    del header["chat.state"]


def _unknown(header: Json) -> None:
    header["other.tokens"] = header["chat.tokens"]


def _type(header: Json) -> None:
    header["chat.tokens"]["dtype"] = "F32"


def _entry(**changes: Any) -> Any:
    def change(header: Json) -> None:
        entry = json.loads(header["__metadata__"]["entry"]) | changes
        header["__metadata__"]["entry"] = json.dumps(entry)

    return change


@pytest.mark.parametrize(
    "change",
    [
        *(_shape, _overlap, _negative, _no_state, _unknown, _type),
        _entry(prompt=""),
        _entry(version="one"),
        _entry(terms={"ttl_seconds": -5}),
        lambda header: header.update({"chat.tokens": [1]}),
        lambda header: header["__metadata__"].update({"entry": "[" * 100_000}),
        lambda header: header["__metadata__"].pop("blake3 chat.state"),
    ],
)
def test_a_header_that_lies_is_refused_though_its_hash_is_right(toy: RunningServer, change: Any) -> None:
    toy.create("exp-true", PROMPT)
    refused(put(toy, "exp-lie", rewritten(exported(toy, "exp-true"), change)), 400, "damaged_file")


def test_what_the_header_says_of_its_place_does_not_count(toy: RunningServer) -> None:
    toy.create("exp-place", PROMPT)
    change = _entry(model="../../etc", name="../x", owner="somebody", origin="derived", version=10**9)
    made = put(toy, "exp-placed", rewritten(exported(toy, "exp-place"), change))
    assert made.status_code == 200, made.text
    cache = shown(toy, "exp-placed")
    assert (cache["model"], cache["cache_name"], cache["version"]) == ("toy", "exp-placed", 1)
    stored = read_intact(toy.cache_dir / "toy" / "exp-placed.headstart")
    assert (stored.owner, stored.origin) == ("", "client")


def test_a_client_that_leaves_in_the_middle_leaves_nothing(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    server.create("exp", PROMPT)
    whole = exported(server, "exp")

    def half() -> Any:
        yield whole[: len(whole) // 2]
        raise RuntimeError("gone")

    with pytest.raises(RuntimeError):
        put(server, "left", half())
    assert server.http.get("/v1/cache/toy/left").status_code == 404
    server.restart()
    assert server.files() == ["toy/exp.headstart"]
    assert "failed" not in server.log.read_text()


def test_an_import_makes_room_within_the_quota_or_is_refused(
    start_server: StartServer, tmp_path: Path
) -> None:
    source = start_server("--model", "toy=toy:", cache_dir=tmp_path / "source")
    source.create("exp", PROMPT * 10)
    whole = exported(source, "exp")
    small = start_server("--model", "toy=toy:", "--quota-mb", "0.01", cache_dir=tmp_path / "small")
    refused(put(small, "exp", whole), 507, "quota_exceeded")
    assert small.files() == []
    server = start_server("--model", "toy=toy:", "--quota-mb", "0.08", cache_dir=tmp_path / "here")
    assert put(server, "one", whole).status_code == 200
    assert put(server, "two", whole).status_code == 200
    assert shown(server, "one")["evicted"] == ["chat", "completion"]
    assert server.chat("Hi", use_cache="two")["usage"]["cache_hit"] is True
    assert put(server, "three", exported(server, "one")).status_code == 200
    assert server.chat("Hi", use_cache="three")["usage"]["cache_miss_reason"] == "evicted"


def test_names_with_a_slash_do_not_reach_another_caches_file(toy: RunningServer) -> None:
    toy.create("exp-slash", PROMPT)
    toy.create("file", PROMPT)
    assert shown(toy, "file")["cache_name"] == "file"
    assert exported(toy, "file")
    for method in ("GET", "PUT", "DELETE", "PATCH"):
        response = toy.http.request(method, "/v1/cache/toy/exp-slash%2Ffile", json={})
        refused(response, 400, "invalid_cache_name")
    refused(toy.http.get("/v1/cache/toy/exp-absent/file"), 404, "cache_not_found")
    refused(toy.http.get("/v1/cache/nosuch/exp-slash/file"), 404, "model_not_found")


def test_an_export_that_has_begun_ends_as_it_began(toy: RunningServer) -> None:
    toy.create("exp-begun", PROMPT * 10)
    before = exported(toy, "exp-begun")
    with toy.http.stream("GET", "/v1/cache/toy/exp-begun/file") as response:
        toy.create("exp-begun", "other " + PROMPT)
        toy.http.delete("/v1/cache/toy/exp-begun")
        assert response.read() == before


# The command line.


def test_export_and_import_as_commands(toy: RunningServer, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    toy.create("exp-cli", PROMPT)
    result = headstart("cache", "export", "exp-cli", url=toy.url)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("Exported cache 'exp-cli' to exp-cli.headstart: ")
    assert [path.name for path in tmp_path.iterdir()] == ["exp-cli.headstart"]
    assert (tmp_path / "exp-cli.headstart").stat().st_mode & 0o777 == 0o600
    result = headstart("cache", "import", "exp-cli.headstart", "--name", "exp-cli-2", url=toy.url)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("Created cache 'exp-cli-2' of toy: ")
    result = headstart("cache", "import", "exp-cli.headstart", "--rebuild", url=toy.url)
    assert result.stdout.startswith("Updated cache 'exp-cli' of toy: ")
    assert toy.chat("Hi", use_cache="exp-cli-2")["usage"]["cache_hit"] is True


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["export", "exp-absent"], "no cache 'exp-absent'"),
        (["export", "exp-cli-here", "--out", "/no/such/folder/x"], "No such file"),
        (["export", "a/b"], "is not a name"),
        (["import", "/no/such/file"], "No such file"),
        (["import", "/proc/self/cmdline", "--name", "x"], "The file is damaged"),
    ],
    ids=str,
)
def test_commands_that_fail_say_why(
    toy: RunningServer, arguments: list[str], reason: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    toy.create("exp-cli-here", PROMPT)
    result = headstart("cache", *arguments, url=toy.url)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("headstart: ")
    assert reason in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_create_and_edit_take_how_a_cache_is_kept(toy: RunningServer) -> None:
    result = headstart(
        *("cache", "create", "exp-terms", "--prompt", PROMPT, "--ttl", "900", "--pinned"),
        *("--description", "what it is", "--metadata", "a=b", "--metadata", "c=d=e"),
        url=toy.url,
    )
    assert result.exit_code == 0, result.output
    cache = shown(toy, "exp-terms")
    assert (cache["ttl_seconds"], cache["pinned"], cache["description"]) == (900, True, "what it is")
    assert cache["metadata"] == {"a": "b", "c": "d=e"}
    text = headstart("cache", "show", "exp-terms", url=toy.url).stdout
    assert "what it is" in text
    assert "c=d=e" in text
    result = headstart("cache", "edit", "exp-terms", "--ttl", "0", "--no-pinned", url=toy.url)
    assert result.stdout == "Changed ttl_seconds, pinned of cache 'exp-terms'\n"
    cache = shown(toy, "exp-terms")
    assert (cache["expires"], cache["pinned"], cache["description"]) == (None, False, "what it is")


def test_an_edit_of_nothing_is_wrong_usage(toy: RunningServer) -> None:
    result = headstart("cache", "edit", "exp-terms", url=toy.url)
    assert result.exit_code == 2
    assert "--ttl" in result.stderr
