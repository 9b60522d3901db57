"""`headstart cache` against a running server."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from conftest import StartServer
from headstart.cli.cache import age, follow
from headstart.cli.client import Client, RequestFailed
from headstart.cli.main import app
from servers import RunningServer

PROMPT = "You are a careful assistant. You answer in one short sentence and never guess."
NOBODY = "http://127.0.0.1:1"


def headstart(*arguments: str, url: str, stdin: bytes = b"") -> Result:
    """The command as typed at a terminal 80 columns wide that is piped elsewhere."""
    environment = {"HEADSTART_URL": url, "COLUMNS": "80"}
    return CliRunner().invoke(app, arguments, input=stdin, env=environment)


def shown(server: RunningServer, name: str) -> dict[str, Any]:
    response = server.http.get(f"/v1/cache/toy/{name}")
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_create_says_what_was_made(toy: RunningServer) -> None:
    result = headstart("cache", "create", "cli-made", "--prompt", PROMPT * 3, url=toy.url)
    assert result.exit_code == 0, result.output
    tokens = shown(toy, "cli-made")["tokens"]
    assert result.stdout.startswith(f"Created cache 'cli-made' of toy: {tokens} tokens, ")
    assert len(result.stdout.splitlines()) == 1
    assert result.stderr == ""


def test_creating_again_updates_the_cache(toy: RunningServer) -> None:
    headstart("cache", "create", "cli-twice", "--prompt", "one " + PROMPT, url=toy.url)
    result = headstart("cache", "create", "cli-twice", "--prompt", "two " + PROMPT, url=toy.url)
    assert result.stdout.startswith("Updated cache 'cli-twice'")
    assert shown(toy, "cli-twice")["prompt"] == "two " + PROMPT


def test_no_overwrite_refuses_to_replace_a_cache(toy: RunningServer) -> None:
    headstart("cache", "create", "cli-kept", "--prompt", PROMPT, url=toy.url)
    result = headstart("cache", "create", "cli-kept", "--prompt", "new", "--no-overwrite", url=toy.url)
    assert result.exit_code == 1
    assert result.stderr == "headstart: There is a cache 'cli-kept' already.\n"
    assert shown(toy, "cli-kept")["prompt"] == PROMPT


def test_a_servers_warning_is_passed_on(toy: RunningServer) -> None:
    result = headstart("cache", "create", "cli-short", "--prompt", "Be kind.", url=toy.url)
    assert result.exit_code == 0
    assert result.stderr.startswith("Note: The prompt has only ")


def test_a_prompt_from_a_file_is_taken_as_it_is(toy: RunningServer, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes("Zeile eins\r\n  naïve ✓\n\n".encode())
    result = headstart("cache", "create", "cli-file", "--file", str(file), url=toy.url)
    assert result.exit_code == 0, result.output
    assert shown(toy, "cli-file")["prompt"] == "Zeile eins\r\n  naïve ✓\n\n"


def test_a_prompt_can_come_from_standard_input(toy: RunningServer) -> None:
    result = headstart("cache", "create", "cli-stdin", "--file", "-", url=toy.url, stdin=b"From a pipe.\n")
    assert result.exit_code == 0, result.output
    assert shown(toy, "cli-stdin")["prompt"] == "From a pipe.\n"


@pytest.mark.parametrize("purposes", [["chat"], ["completion"], ["chat", "completion"]])
def test_for_restricts_what_a_cache_serves(toy: RunningServer, purposes: list[str]) -> None:
    flags = [flag for purpose in purposes for flag in ("--for", purpose)]
    result = headstart("cache", "create", "cli-for", "--prompt", PROMPT, *flags, url=toy.url)
    assert result.exit_code == 0, result.output
    assert sorted(shown(toy, "cli-for")["forms"]) == purposes


@pytest.mark.parametrize(
    ("flags", "stdin", "reason"),
    [
        ([], b"", "--prompt"),
        (["--prompt", "x", "--file", "-"], b"x", "--prompt"),
        (["--file", "/no/such/file"], b"", "No such file"),
        (["--file", "-"], b"\xff\xfe", "not UTF-8 text"),
        (["--prompt", "x", "--for", "embedding"], b"", "embedding"),
    ],
    ids=["neither", "both", "no-file", "not-text", "unknown-purpose"],
)
def test_wrong_usage_is_explained(toy: RunningServer, flags: list[str], stdin: bytes, reason: str) -> None:
    result = headstart("cache", "create", "cli-never", *flags, url=toy.url, stdin=stdin)
    assert result.exit_code == 2
    assert reason in result.stderr
    assert toy.http.get("/v1/cache/toy/cli-never").status_code == 404


def test_list_shows_a_line_for_each_cache(toy: RunningServer) -> None:
    toy.create("cli-listed", PROMPT)
    toy.chat("Hi", use_cache="cli-listed")
    result = headstart("cache", "list", url=toy.url)
    assert result.exit_code == 0, result.output
    heading, *lines = result.stdout.splitlines()
    assert heading.split() == ["Name", "Model", "Tokens", "MB", "Hits", "Last", "used", "Updated"]
    line = next(line for line in lines if line.startswith("cli-listed "))
    assert line.split()[1:3] == ["toy", str(shown(toy, "cli-listed")["tokens"])]
    assert line.split()[4:] == ["1", "just", "now", "just", "now"]


def test_list_fits_a_terminal_of_80_columns_and_cuts_no_name(toy: RunningServer) -> None:
    name = "cli-" + 60 * "n"
    toy.create(name, PROMPT)
    lines = headstart("cache", "list", url=toy.url).stdout.splitlines()
    assert max(map(len, lines)) <= 80
    first_column = "".join(line.split(" ")[0] for line in lines)
    assert name in first_column


def test_list_of_a_model_resolves_aliases(toy: RunningServer) -> None:
    toy.create("cli-alias", PROMPT)
    result = headstart("cache", "list", "--model", "qwen3-0.6b", url=toy.url)
    assert "cli-alias" in result.stdout


def test_an_empty_list_says_how_to_make_a_cache(start_server: StartServer) -> None:
    result = headstart("cache", "list", url=start_server("--model", "toy=toy:").url)
    assert result.exit_code == 0
    assert "headstart cache create" in result.stdout


def test_list_as_json_is_the_servers_answer(toy: RunningServer) -> None:
    toy.create("cli-json", PROMPT)
    answer = json.loads(headstart("cache", "list", "--json", url=toy.url).stdout)
    assert answer == toy.http.get("/v1/cache").json()


def test_show_tells_everything_and_the_prompt(toy: RunningServer) -> None:
    prompt = "[bold]First[/bold] line.\n\nAn unusually long second line " + 20 * "that goes on and on "
    toy.create("cli-shown", prompt)
    result = headstart("cache", "show", "cli-shown", url=toy.url)
    assert result.exit_code == 0, result.output
    fields = {line.split("  ")[0] for line in result.stdout.split("\n\n")[0].splitlines()}
    assert fields >= {"Name", "Model", "Version", "Tokens", "Size", "For", "Build time", "Hits", "Last used"}
    assert result.stdout.endswith(f"\n\n{prompt}\n")


def test_show_as_json_is_the_servers_answer(toy: RunningServer) -> None:
    toy.create("cli-show-json", PROMPT)
    result = headstart("cache", "show", "cli-show-json", "--json", url=toy.url)
    assert json.loads(result.stdout) == shown(toy, "cli-show-json")


def test_delete_says_what_it_deleted(toy: RunningServer) -> None:
    toy.create("cli-gone", PROMPT)
    result = headstart("cache", "delete", "cli-gone", "--model", "qwen3-0.6b", url=toy.url)
    assert result.exit_code == 0, result.output
    assert result.stdout == "Deleted cache 'cli-gone' of toy\n"
    assert toy.http.get("/v1/cache/toy/cli-gone").status_code == 404


@pytest.mark.parametrize(
    "arguments",
    [
        ["show", "cli-unknown"],
        ["delete", "cli-unknown"],
        ["create", "cli-unknown", "--prompt", "x", "--model", "nosuch"],
        ["list", "--model", "nosuch"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_does_not_exist_is_told_with_the_servers_words(toy: RunningServer, arguments: list[str]) -> None:
    result = headstart("cache", *arguments, url=toy.url)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("headstart: ")
    assert ("cli-unknown" if "nosuch" not in arguments else "nosuch") in result.stderr


@pytest.mark.parametrize("name", ["two words", "a/b", "..", ".", "", "ä?#%", "[red]", "-rf", "x" * 65])
@pytest.mark.parametrize("command", ["create", "show", "delete"])
def test_a_name_that_is_none_is_refused_by_the_server(toy: RunningServer, command: str, name: str) -> None:
    flags = ["--prompt", PROMPT] if command == "create" else []
    result = headstart("cache", command, *flags, "--", name, url=toy.url)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith(f"headstart: {name[:80]!r} is not a name: ")


@pytest.mark.parametrize("model", ["a/b", "..", ""])
def test_a_model_that_is_none_is_an_error(toy: RunningServer, model: str) -> None:
    result = headstart("cache", "list", "--model", model, url=toy.url)
    assert result.exit_code == 1
    assert result.stderr.startswith("headstart: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["create", "x", "--prompt", "x", "--model", "toy"],
        ["list"],
        ["show", "x"],
        ["delete", "x"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_without_a_server_the_cure_is_named(arguments: list[str]) -> None:
    result = headstart("cache", *arguments, url=NOBODY)
    assert result.exit_code == 1
    assert result.stderr == (
        f"headstart: There is no server at {NOBODY}. Start one with `headstart serve`, or name another with "
        "--url.\n"
    )


@pytest.mark.parametrize("url", ["http://[", "ftp://127.0.0.1", "http://127.0.0.1:99999"])
def test_a_wrong_address_is_an_error_not_a_traceback(url: str) -> None:
    result = headstart("cache", "list", url=url)
    assert result.exit_code == 1
    assert result.stderr.startswith("headstart: ")


def test_an_address_needs_no_scheme(toy: RunningServer) -> None:
    result = headstart("cache", "list", url=toy.url.removeprefix("http://"))
    assert result.exit_code == 0, result.output


def test_a_proxy_is_not_asked_for_this_machine(toy: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, NOBODY)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert headstart("cache", "list", url=toy.url).exit_code == 0


def test_the_command_runs_as_a_program(toy: RunningServer) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "headstart", "cache", "list", "--json", "--url", toy.url],
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout)["object"] == "list"
    assert done.stderr == b""


def test_progress_is_shown_on_a_terminal_and_leaves_only_the_result() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, no_color=True, width=80)
    assert follow(_creation(), console) == {"object": "cache.created"}
    assert "1100/1100 tokens" in screen.getvalue()
    assert screen.getvalue().endswith("\x1b[1A\x1b[2K")


def test_progress_is_not_shown_in_a_pipe() -> None:
    pipe = io.StringIO()
    assert follow(_creation(), Console(file=pipe)) == {"object": "cache.created"}
    assert pipe.getvalue() == ""


def _creation() -> list[dict[str, object]]:
    reports = [{"object": "cache.progress", "computed": n, "total": 1100} for n in range(100, 1101, 100)]
    return [*reports, {"object": "cache.created"}]


@pytest.mark.parametrize(
    ("seconds", "words"), [(5, "just now"), (60, "1 min ago"), (7300, "2 h ago"), (90000, "1 d ago")]
)
def test_ages_are_told_in_their_largest_unit(seconds: int, words: str) -> None:
    assert age((datetime.now(UTC) - timedelta(seconds=seconds)).isoformat()) == words
    assert age(None) == "never"


def answering(response: httpx.Response) -> Client:
    """A client whose server always gives this answer."""
    client = Client("http://server")
    client._http = httpx.Client(transport=httpx.MockTransport(lambda _: response), base_url="http://server")
    return client


@pytest.mark.parametrize(
    "response",
    [
        httpx.Response(200, text="<html>Welcome"),
        httpx.Response(502, text="Bad Gateway"),
        httpx.Response(404, json={"detail": "Not Found"}),
        httpx.Response(200, json=["a list"]),
        httpx.Response(200, json={"object": "something else"}),
    ],
)
def test_another_program_at_the_address_is_recognised(response: httpx.Response) -> None:
    with answering(response) as client, pytest.raises(RequestFailed, match="not a Headstart server"):
        client.call("GET", "/v1/models", "list")
    with answering(response) as client:
        assert not client.is_ready()


def test_line_ends_that_json_may_contain_do_not_end_an_event() -> None:
    text = "a\u2028b\x85c\x0bd"
    body = b": comment\n\ndata: " + json.dumps({"t": text}, ensure_ascii=False).encode() + b"\n\n"
    with answering(httpx.Response(200, content=body + b"data: [DONE]\n\n")) as client:
        assert list(client.events("/", {})) == [{"t": text}]


def test_a_stream_that_breaks_off_is_an_error() -> None:
    body = b'data: {"object": "cache.progress", "computed": 1, "total": 2}\n\n'
    with (
        answering(httpx.Response(200, content=body)) as client,
        pytest.raises(RequestFailed, match="ended in the middle"),
    ):
        list(client.events("/", {}))
