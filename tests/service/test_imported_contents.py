"""What an imported file says goes through the same checks as what a request says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from conftest import StartServer
from headers import with_entry
from servers import Json, RunningServer, said

PROMPT = "You keep the lighthouse and never sleep. " * 8
CHAT_ONLY: dict[str, Any] = {"for": ["chat"]}


def nested(levels: int) -> Any:
    value: Any = {}
    for _ in range(levels):
        value = {"a": value}
    return value


def call(arguments: Any) -> Json:
    function = {"name": "look", "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


USER = {"role": "user", "content": "Who?"}
FUNCTION = {"type": "function", "function": {"name": "look"}}


def of(*messages: Any, tools: Any = ()) -> Json:
    return {"prompt": "", "messages": list(messages), "tools": list(tools)}


NO_CONTENTS: dict[str, tuple[Json, str]] = {
    "no-role": (of({"unfinished": True}), "messages.0.role"),
    "number-as-content": (of({"role": "user", "content": 5}), "messages.0.content"),
    "no-content": (of({"role": "user"}), "messages.0"),
    "null-content": (of({"role": "user", "content": None}), "messages.0"),
    "unknown-role": (of({"role": "root", "content": "x"}), "messages.0.role"),
    "role-is-a-list": (of({"role": ["user"], "content": "x"}), "messages.0.role"),
    "no-object": (of("Who?"), "messages"),
    "unfinished-in-the-middle": (of({**USER, "unfinished": True}, USER), "unfinished"),
    "unfinished-is-a-word": (of({**USER, "unfinished": "yes"}), "messages.0.unfinished"),
    "call-without-function": (of({**call({}), "tool_calls": [{}]}), "messages.0.tool_calls.0"),
    "calls-are-a-text": (of({**call({}), "tool_calls": "look"}), "messages.0.tool_calls"),
    "deep-call": (of(call(nested(400))), "messages.0.tool_calls.0"),
    "deep-tool": (of(USER, tools=[{**FUNCTION, "x": nested(400)}]), "tools.0"),
    "deeper-tool": (of(USER, tools=[{**FUNCTION, "x": nested(900)}]), "tools.0"),
    "tool-without-function": (of(USER, tools=[{}]), "tools.0"),
    "tool-without-name": (of(USER, tools=[{"type": "function", "function": {}}]), "tools.0"),
    "parameters-are-a-text": (
        of(USER, tools=[{"type": "function", "function": {"name": "look", "parameters": "x"}}]),
        "tools.0",
    ),
    "too-many-messages": (of(*[USER] * 10_001), "messages"),
    "too-many-tools": (of(USER, tools=[FUNCTION] * 1_001), "tools"),
    "prompt-and-messages": ({"prompt": PROMPT, "messages": [USER]}, "prompt"),
    "prompt-and-tools": ({"prompt": PROMPT, "tools": [FUNCTION]}, "tools"),
    "nothing": ({"prompt": "", "messages": [], "tools": []}, "prompt"),
    "long-description": ({"terms": {"description": "d" * 2_000_000}}, "terms.description"),
    "endless-time": ({"terms": {"ttl_seconds": 1e308}}, "terms.ttl_seconds"),
    "negative-time": ({"terms": {"ttl_seconds": -1}}, "terms.ttl_seconds"),
    "many-pairs": ({"terms": {"metadata": {str(i): "x" for i in range(33)}}}, "terms.metadata"),
    "long-key": ({"terms": {"metadata": {"k" * 65: "x"}}}, "terms.metadata"),
    "long-value": ({"terms": {"metadata": {"k": "x" * 1001}}}, "terms.metadata"),
    "long-value-named-response": ({"terms": {"metadata": {"response": "x" * 1001}}}, "terms.metadata"),
}


def put(server: RunningServer, name: str, content: bytes, **query: Any) -> httpx.Response:
    return server.http.put(f"/v1/cache/toy/{name}/file", content=content, params=query)


def exported(server: RunningServer, name: str) -> bytes:
    response = server.http.get(f"/v1/cache/toy/{name}/file")
    assert response.status_code == 200, response.text
    return response.content


@pytest.fixture(scope="module")
def whole(toy: RunningServer) -> bytes:
    """A cache's file with states for chats only, as messages have them."""
    toy.create("contents", PROMPT, **CHAT_ONLY)
    return exported(toy, "contents")


@pytest.mark.parametrize("rebuild", [False, True])
@pytest.mark.parametrize("case", NO_CONTENTS)
def test_what_no_request_could_say_is_refused_with_the_field(
    toy: RunningServer, whole: bytes, case: str, rebuild: bool
) -> None:
    fields, field = NO_CONTENTS[case]
    response = put(toy, "contents-bad", with_entry(whole, **fields), rebuild=rebuild)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "damaged_file"), response.text
    assert field in error["message"]
    assert toy.http.get("/v1/cache/toy/contents-bad").status_code == 404


@pytest.mark.slow
def test_a_file_in_the_directory_that_says_it_disturbs_nobody(
    start_server: StartServer, tmp_path: Path
) -> None:
    """Neither while the server runs nor at its start."""
    server = start_server("--model", "toy=toy:")
    server.create("good", PROMPT, **CHAT_ONLY)
    expected = said(server.chat("Who?", use_cache="good"))
    whole = exported(server, "good")
    for case, (fields, _) in NO_CONTENTS.items():
        path = server.cache_dir / "toy" / f"bad-{case}.headstart"
        if case != "long-value-named-response":
            path.write_bytes(with_entry(whole, name=f"bad-{case}", **fields))
    for _ in range(2):
        assert said(server.chat("Who?", use_cache="good")) == expected
        server.chat("Who?", system=PROMPT)
        server.chat("Who?", explain_cache=True)
        names = [cache["cache_name"] for cache in server.http.get("/v1/cache").json()["data"]]
        assert [name for name in names if name.startswith("bad")] == []
        verdicts = server.post("/v1/verify").json()
        damaged = {each["cache_name"]: each for each in verdicts["data"] if each["state"] == "damaged"}
        assert len(damaged) == len(NO_CONTENTS) - 1
        assert all(f"{name}.headstart" in each["detail"] for name, each in damaged.items())
        for name in damaged:
            response = server.post("/v1/chat/completions", model="toy", messages=[USER], use_cache=name)
            assert response.status_code == 404
        server.restart()
        server.chat("Who?")
    assert "bad-no-role.headstart: unreadable entry: messages.0.role" in server.log.read_text()


def test_what_a_model_wrote_however_deep_is_kept_and_gone_on_from(toy: RunningServer, whole: bytes) -> None:
    text = '{"a":' * 100 + "1" + "}" * 100
    deep = with_entry(whole, **of(USER, call(text), {"role": "tool", "content": "yes"}))
    assert put(toy, "contents-deep", deep, rebuild=True).status_code == 200
    shown = toy.http.get("/v1/cache/toy/contents-deep").json()
    assert shown["messages"][1]["tool_calls"][0]["function"]["arguments"] == text
    assert toy.chat("Who?", use_cache="contents-deep")["usage"]["cache_hit"] is True


def test_messages_are_taken_as_requests_may_write_them(toy: RunningServer, whole: bytes) -> None:
    parts = [{"type": "text", "text": "You "}, {"type": "text", "text": PROMPT}]
    messages = [{"role": "developer", "content": parts, "colour": "red"}, {**call({"a": 1}), "content": None}]
    response = put(toy, "contents-parts", with_entry(whole, **of(*messages)), rebuild=True)
    assert response.status_code == 200, response.text
    shown = toy.http.get("/v1/cache/toy/contents-parts").json()
    assert shown["messages"] == [{"role": "system", "content": "You " + PROMPT}, call({"a": 1})]


@pytest.mark.parametrize("rebuild", [False, True])
def test_an_import_takes_no_name_that_creating_could_not(
    toy: RunningServer, whole: bytes, rebuild: bool
) -> None:
    response = put(toy, "derived-" + "0" * 32, whole, rebuild=rebuild)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_cache_name")


def test_neither_an_import_nor_a_saved_chat_replaces_what_is_declared(
    start_server: StartServer, tmp_path: Path
) -> None:
    config = tmp_path / "headstart.toml"
    config.write_text(f'[caches.fixed]\nprompt = "{PROMPT}"\n')
    server = start_server("--model", "toy=toy:", "--config", str(config))
    server.create("other", "not the lighthouse, but the sea. " * 8)
    whole = exported(server, "other")
    for rebuild in (False, True):
        response = put(server, "fixed", whole, rebuild=rebuild)
        assert (response.status_code, response.json()["error"]["code"]) == (409, "cache_conflict")
    saving = {"save_as": "fixed", "allow_overwrite": True}
    response = server.post("/v1/chat/completions", model="toy", messages=[USER], **saving)
    assert (response.status_code, response.json()["error"]["code"]) == (409, "cache_conflict")
    assert server.http.get("/v1/cache/toy/fixed").json()["prompt"] == PROMPT


def test_what_the_models_template_refuses_is_refused_in_a_file_too(
    start_server: StartServer, tmp_path: Path
) -> None:
    """After the user's message the template wants the assistant's, so nothing can be asked after it."""
    server = start_server("--model", "toy=toy:template=nosystem")
    server.create("good", PROMPT, **CHAT_ONLY)
    response = put(server, "refused", with_entry(exported(server, "good"), **of(USER)))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages"), response.text


def test_a_cache_that_the_template_refuses_fails_nobody_who_does_not_name_it(
    start_server: StartServer,
) -> None:
    """It lies in the directory, made under another template say."""
    server = start_server("--model", "toy=toy:template=nosystem")
    server.create("good", PROMPT, **CHAT_ONLY)
    refused = with_entry(exported(server, "good"), name="refused", **of(USER))
    (server.cache_dir / "toy" / "refused.headstart").write_bytes(refused)
    server.restart()
    assert server.http.get("/v1/cache/toy").status_code == 200
    shown = server.http.get("/v1/cache/toy/refused").json()
    assert (shown["would_hit"], shown["miss_reason"]) == (False, "template_changed")
    assert server.chat("Who?")["usage"]["prompt_tokens"] > 0
    assert server.chat("Who?", explain_cache=True)["cache_explanation"]["closest_cache"] is not None
    verdicts = {each["cache_name"]: each for each in server.post("/v1/verify", repair=True).json()["data"]}
    assert (verdicts["refused"]["state"], verdicts["refused"]["action"]) == ("unfit", "failed")
    assert verdicts["good"]["state"] == "ok"


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("ttl_seconds = 1e308", "ttl_seconds"),
        ("ttl_seconds = inf", "ttl_seconds"),
        (f'description = "{"d" * 1001}"', "description"),
    ],
    ids=["endless", "infinite", "long"],
)
def test_what_is_declared_goes_through_the_same_checks(tmp_path: Path, line: str, field: str) -> None:
    from headstart.config.settings import load_settings
    from headstart.errors import StartupError

    config = tmp_path / "headstart.toml"
    config.write_text(f'[caches.fixed]\nprompt = "{PROMPT}"\n{line}\n')
    with pytest.raises(StartupError, match=rf"caches\.fixed\.{field}"):
        load_settings(config)
