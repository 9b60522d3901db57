"""What `cache_control` marks in Anthropic's API becomes a cache: written once, read from then on, also after
a restart, and gone when it isn't used for its time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic

from conftest import StartServer
from headstart.caches.entry import Content
from headstart.caches.store import Store
from headstart.service.origins.breakpoints import BreakpointPlan, PlacedBreakpoint
from servers import WITHOUT_STORE, Json, RunningServer, eventually, said

MARK: Any = {"type": "ephemeral"}
HOUR: Any = {"type": "ephemeral", "ttl": "1h"}
KEEPER = "You keep the lighthouse. " * 20
LETTER = "The ship left the harbour at dawn, with nobody on board. " * 8
TOY = ("--model", "toy=toy:")
TOOLS = ("--model", "toy=toy:template=tools")


def block(text: str, mark: Any = None) -> Any:
    marked = {"cache_control": mark} if mark else {}
    return {"type": "text", "text": text, **marked}


def user(*blocks: Any) -> Any:
    return {"role": "user", "content": list(blocks)}


def assistant(text: str) -> Any:
    return {"role": "assistant", "content": text}


def ask(server: RunningServer, *turns: Any, system: Any = None, **more: Any) -> Any:
    """One greedy message."""
    body = {"temperature": 0, **more.pop("extra_body", {})}
    given: Any = {"model": "toy", "max_tokens": 12, "messages": list(turns), "extra_body": body, **more}
    if system:
        given["system"] = system
    with Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        return client.messages.create(**given)


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content)


def counts(message: Any) -> tuple[int, int, int]:
    """Tokens of the prompt neither read nor written, written, and read."""
    usage = message.usage
    return usage.input_tokens, usage.cache_creation_input_tokens, usage.cache_read_input_tokens


def caches(server: RunningServer) -> list[Json]:
    listed = server.http.get("/v1/cache").json()
    return [] if listed["building"] else list(listed["data"])


def kept(server: RunningServer, n: int) -> list[Json]:
    """The caches, once there are `n` of them, the shortest first."""
    eventually(lambda: len(caches(server)) == n)
    return sorted(caches(server), key=lambda cache: int(cache["tokens"]))


def check_restart(server: RunningServer, *turns: Any, least: int, **more: Any) -> Any:
    """Asks again after a restart: all that was marked is read from the disk, and the text is the same as
    without."""
    server.restart()
    warm = ask(server, *turns, **more)
    assert warm.timings["cache_source"] == "file"
    new, written, read = counts(warm)
    assert (written, read) == (0, least)
    cold = ask(server, *turns, **more, extra_body={"cache_prompt": False})
    assert text_of(cold) == text_of(warm)
    assert counts(cold)[2] == 0
    assert sum(counts(cold)) == new + read
    return warm


def test_a_marked_system_prompt_is_written_once_and_then_read(start_server: StartServer) -> None:
    server = start_server(*TOY)
    system = [block(KEEPER, MARK)]
    first = ask(server, user(block("What do you see?")), system=system)
    (cache,) = kept(server, 1)
    assert counts(first)[1:] == (cache["tokens"], 0)
    assert first.usage.cache_creation.ephemeral_5m_input_tokens == cache["tokens"]
    assert first.usage.cache_creation.ephemeral_1h_input_tokens == 0
    assert (cache["origin"], cache["ttl_seconds"]) == ("automatic", 300)
    second = ask(server, user(block("Who are you?")), system=system)
    assert counts(second)[1:] == (0, cache["tokens"])
    check_restart(server, user(block("Who are you?")), system=system, least=cache["tokens"])
    assert kept(server, 1)[0]["version"] == 1


def test_chats_of_the_other_api_start_from_it_too(start_server: StartServer) -> None:
    server = start_server(*TOY)
    marked = ask(server, user(block("Who?")), system=[block(KEEPER, MARK)])
    (cache,) = kept(server, 1)
    server.restart()
    chat = server.chat("Who?", system=KEEPER, max_tokens=12)
    assert said(chat) == text_of(marked)
    assert chat["usage"]["prompt_tokens_details"]["cached_tokens"] == cache["tokens"]


def test_what_follows_the_mark_in_the_system_prompt_may_change(start_server: StartServer) -> None:
    server = start_server(*TOY)
    ask(server, user(block("Who?")), system=[block(KEEPER, MARK), block("It is Monday.")])
    (cache,) = kept(server, 1)
    tuesday = [block(KEEPER, MARK), block("It is Tuesday.")]
    assert counts(ask(server, user(block("Who?")), system=tuesday))[1:] == (0, cache["tokens"])
    check_restart(server, user(block("Who?")), system=tuesday, least=cache["tokens"])


def test_a_marked_document_is_read_for_other_questions(start_server: StartServer) -> None:
    server = start_server(*TOY)
    ask(server, user(block(LETTER, HOUR), block("Who was on board?")))
    (cache,) = kept(server, 1)
    assert cache["ttl_seconds"] == 3600
    other = user(block(LETTER, HOUR), block("When did it leave?"))
    check_restart(server, other, least=cache["tokens"])


def test_a_longer_conversation_starts_from_the_mark_of_the_turn_before(start_server: StartServer) -> None:
    server = start_server(*TOY)
    one, two = user(block(LETTER, MARK)), user(block("And then? " * 20, MARK))
    first = ask(server, one)
    kept(server, 1)
    answer = assistant(text_of(first))
    server.restart()
    second = ask(server, one, answer, two)
    short, long = kept(server, 2)
    _, written, read = counts(second)
    assert second.timings["cache_source"] == "file"
    assert short["tokens"] - 64 < read <= short["tokens"]
    assert read + written == long["tokens"]
    check_restart(server, one, answer, two, least=long["tokens"])


def test_each_mark_of_a_request_is_kept(start_server: StartServer) -> None:
    server = start_server(*TOOLS)
    tool = {"name": "look", "input_schema": {"type": "object"}, "cache_control": HOUR}
    system = [block(KEEPER, HOUR), block("It is Monday. " * 10, MARK)]
    first = ask(server, user(block(LETTER, MARK)), system=system, tools=[tool])
    sizes = [cache["tokens"] for cache in kept(server, 3)]
    assert first.usage.cache_creation_input_tokens == sizes[-1]
    created = first.usage.cache_creation
    # The tools are written after the system prompt, so they are kept with all of it.
    assert created.ephemeral_1h_input_tokens == sizes[1]
    assert created.ephemeral_5m_input_tokens == sizes[2] - sizes[1]
    server.restart()
    other = [block(KEEPER, HOUR), block("It is Tuesday. " * 10, MARK)]
    assert counts(ask(server, user(block("Who?")), system=other, tools=[tool]))[2] in range(
        sizes[0] - 64, sizes[0] + 1
    )


def test_marked_tools_are_kept_with_the_system_prompt(start_server: StartServer) -> None:
    server = start_server(*TOOLS)
    schema = {"type": "object", "properties": {"where": {"type": "string", "description": "Where? " * 30}}}
    tools = [{"name": "look", "input_schema": schema, "cache_control": MARK}]
    ask(server, user(block("Who?")), system="You look.", tools=tools)
    (cache,) = kept(server, 1)
    check_restart(server, user(block("Where?")), system="You look.", tools=tools, least=cache["tokens"])
    others = [{"name": "listen", "input_schema": schema}]
    assert counts(ask(server, user(block("Where?")), system="You look.", tools=others))[2] <= 64


def _tools(*names: str, mark_at: int = -1) -> list[Any]:
    schema = {"type": "object", "properties": {"where": {"type": "string", "description": "Where? " * 40}}}
    tools: list[Any] = [
        {"name": name, "description": "Eyes. " * 20, "input_schema": schema} for name in names
    ]
    tools[mark_at]["cache_control"] = MARK
    return tools


def _check_tools_alone(server: RunningServer, model: str, mark_at: int) -> None:
    tools = _tools("look", "listen", mark_at=mark_at)
    first = ask(server, user(block("Who?")), tools=tools, model=model)
    (cache,) = kept(server, 1)
    assert counts(first)[1:] == (cache["tokens"], 0)
    assert cache["tokens"] > 64
    body = {"tools": tools, "model": model}
    check_restart(server, user(block("Where is it?")), **body, least=cache["tokens"])
    # What follows the tools may be anything, and a request without marks starts from them too.
    server.restart()
    turns = [user(block("Who?")), assistant("Me."), user(block("Where?"))]
    unmarked = [{key: value for key, value in tool.items() if key != "cache_control"} for tool in tools]
    later = ask(server, *turns, tools=unmarked, model=model)
    assert counts(later)[1:] == (0, cache["tokens"])
    others = ask(server, *turns, tools=_tools("look", "smell"), model=model)
    assert counts(others)[2] < cache["tokens"]


@pytest.mark.parametrize("mark_at", [-1, 0])
def test_marked_tools_are_kept_without_a_system_prompt(start_server: StartServer, mark_at: int) -> None:
    _check_tools_alone(start_server(*TOOLS), "toy", mark_at)


def test_marked_tools_are_kept_where_the_template_has_none(start_server: StartServer) -> None:
    _check_tools_alone(start_server(*TOY), "toy", -1)


def test_marked_tools_are_kept_with_a_system_turn_and_the_configured_message(
    start_server: StartServer, tmp_path: Path
) -> None:
    server = start_server(*TOOLS)
    tools = _tools("look")
    system: Any = {"role": "system", "content": KEEPER}
    ask(server, system, user(block("Who?")), tools=tools)
    (cache,) = kept(server, 1)
    check_restart(server, system, user(block("Where?")), tools=tools, least=cache["tokens"])
    assert cache["tokens"] > len(KEEPER) // 2
    config = tmp_path / "headstart.toml"
    config.write_text(
        'default_system = "You look."\nautomatic = false\nmodels = {toy = "toy:template=tools"}\n'
    )
    other = start_server("--config", str(config), cache_dir=tmp_path / "other")
    ask(other, user(block("Who?")), tools=tools)
    (cache,) = kept(other, 1)
    assert cache["tokens"] > 64
    check_restart(other, user(block("Where?")), tools=tools, least=cache["tokens"])


def test_marked_tools_of_a_model_whose_states_are_used_whole(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:template=tools,can_cut=0")
    tools = _tools("look")
    ask(server, user(block("Who?")), tools=tools)
    (cache,) = kept(server, 1)
    check_restart(server, user(block("Where?")), tools=tools, least=cache["tokens"])


def test_results_of_tools_may_be_marked(start_server: StartServer) -> None:
    server = start_server(*TOOLS)
    tools = [{"name": "look", "input_schema": {"type": "object"}}]
    call = {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": LETTER, "cache_control": MARK}
    turns = [user(block("Look!")), {"role": "assistant", "content": [call]}, user(result)]
    first = ask(server, *turns, tools=tools)
    (cache,) = kept(server, 1)
    assert counts(first)[1] == cache["tokens"]
    check_restart(server, *turns, tools=tools, least=cache["tokens"])


def test_the_whole_request_may_be_marked(start_server: StartServer) -> None:
    server = start_server(*TOY)
    first = ask(server, user(block(LETTER)), cache_control=MARK)
    (cache,) = kept(server, 1)
    assert counts(first)[1] == cache["tokens"]
    check_restart(server, user(block(LETTER)), cache_control=MARK, least=cache["tokens"])


def test_a_prompt_is_kept_without_an_answer(start_server: StartServer) -> None:
    server = start_server(*TOY)
    ask(server, user(block("Who?")), system=[block(KEEPER, MARK)], max_tokens=0)
    (cache,) = kept(server, 1)
    check_restart(server, user(block("You?")), system=[block(KEEPER, MARK)], least=cache["tokens"])


def _streamed_figures(server: RunningServer, **body: Any) -> tuple[Json, Json]:
    """The figures of the prompt at the stream's start and at its end."""
    fields = {"model": "toy", "max_tokens": 4, "stream": True, **body}
    with server.http.stream("POST", "/v1/messages", json=fields) as response:
        data = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    told = {event["type"]: event for event in map(json.loads, data)}
    start, end = told["message_start"]["message"]["usage"], told["message_delta"]["usage"]
    assert start.pop("output_tokens") == 0
    assert end.pop("output_tokens") > 0
    return start, {name: end[name] for name in start}


def _check_streams(server: RunningServer, model: str) -> None:
    """Start and end of each stream tell the same: of what is written, what is read from a slot, from a file,
    from nowhere, and in part."""
    body: Json = {"model": model, "system": [block(KEEPER, MARK)]}
    seen = []
    for step in ("written", "read from a slot", "read from a file", "computed", "a longer one"):
        if step == "read from a file":
            server.restart()
        longer = step == "a longer one"
        blocks = [block(LETTER, HOUR)] if longer else [block("Who?")]
        start, end = _streamed_figures(
            server, messages=[user(*blocks)], cache_prompt=step != "computed", **body
        )
        assert start == end, step
        seen.append((end["cache_creation_input_tokens"], end["cache_read_input_tokens"]))
        if step == "written":
            tokens = kept(server, 1)[0]["tokens"]
        if longer:
            assert end["cache_creation"]["ephemeral_1h_input_tokens"] == seen[-1][0] > 0
    assert seen[:3] == [(tokens, 0), (0, tokens), (0, tokens)]
    assert seen[3][1] == 0
    assert 0 < seen[4][1] <= tokens


def test_streams_tell_what_was_written_and_read_from_their_start_on(start_server: StartServer) -> None:
    _check_streams(start_server(*TOY), "toy")


def test_a_stream_tells_at_its_start_what_the_engine_does_not_what_was_planned(
    start_server: StartServer,
) -> None:
    server = start_server(*TOY, env=WITHOUT_STORE)
    body: Json = {"messages": [user(block("Who?"))], "system": [block(KEEPER, MARK)]}
    _streamed_figures(server, **body)
    kept(server, 1)
    server.restart()
    (path,) = (server.cache_dir / "toy").glob("*.headstart")
    # The server checks the file's hashes, and so do its requests from then on.
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    start, end = _streamed_figures(server, **body)
    assert start == end
    assert end["cache_read_input_tokens"] == 0


def test_the_client_reads_the_same_figures_from_a_stream(start_server: StartServer) -> None:
    server = start_server(*TOY)
    system = [block(KEEPER, MARK)]
    seen = []
    for _ in range(2):
        with (
            Anthropic(base_url=server.url, api_key="none", max_retries=0) as client,
            client.messages.stream(
                model="toy", max_tokens=4, system=system, messages=[user(block("Who?"))]
            ) as stream,
        ):
            seen.append(counts(stream.get_final_message()))
        kept(server, 1)
    tokens = kept(server, 1)[0]["tokens"]
    assert [(written, read) for _, written, read in seen] == [(tokens, 0), (0, tokens)]


def test_too_many_marks_are_refused_and_as_many_as_may_be_are_not(start_server: StartServer) -> None:
    server = start_server(*TOY)
    marked = [block(f"{LETTER}{i}", MARK) for i in range(5)]
    with pytest.raises(anthropic.BadRequestError, match="4 is the most"):
        ask(server, user(*marked))
    ask(server, user(*marked[:4]))
    kept(server, 4)


def test_what_is_too_short_is_not_kept(start_server: StartServer) -> None:
    server = start_server(*TOY)
    message = ask(server, user(block("Who?", MARK)), system=[block("You look.", MARK)])
    assert counts(message)[1:] == (0, 0)
    ask(server, user(block("Who?")), system=[block(KEEPER, MARK)])
    assert len(kept(server, 1)) == 1


def test_nothing_is_kept_where_a_cache_is_named_or_nothing_is_to_be_reused(
    start_server: StartServer,
) -> None:
    server = start_server(*TOY)
    server.create("keeper", "You keep. " * 10)
    for body in ({"use_cache": "keeper"}, {"cache_prompt": False}):
        message = ask(server, user(block(LETTER, MARK)), extra_body=body)
        assert counts(message)[1] == 0
    server.chat("Nothing.", max_tokens=1)
    assert [cache["cache_name"] for cache in kept(server, 1)] == ["keeper"]


def test_a_server_that_is_stopped_first_keeps_what_it_said_it_would(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:ms_per_token=1")
    message = ask(server, user(block("Who?")), system=[block(KEEPER, MARK)], max_tokens=1)
    check_restart(server, user(block("Who?")), system=[block(KEEPER, MARK)], least=counts(message)[1])


def test_a_longer_time_than_before_is_taken_over(start_server: StartServer) -> None:
    server = start_server(*TOY)
    ask(server, user(block("Who?")), system=[block(KEEPER, MARK)])
    assert kept(server, 1)[0]["ttl_seconds"] == 300
    ask(server, user(block("Who?")), system=[block(KEEPER, HOUR)])
    eventually(lambda: [cache["ttl_seconds"] for cache in caches(server)] == [3600])
    ask(server, user(block("Who?")), system=[block(KEEPER, MARK)])
    assert kept(server, 1)[0]["ttl_seconds"] == 3600


def test_time_begins_anew_with_each_use(start_server: StartServer) -> None:
    server = start_server(*TOY)
    ask(server, user(block("Who?")), system=[block(KEEPER, MARK)])
    before = kept(server, 1)[0]
    ask(server, user(block("You?")), system=[block(KEEPER, MARK)])
    eventually(lambda: caches(server)[0]["hits"] == 1)
    after = caches(server)[0]
    assert after["expires"] > before["expires"]
    assert after["updated"] == before["updated"]


def test_a_cache_ends_when_it_isnt_used_for_its_time_and_not_before(
    start_server: StartServer, tmp_path: Path
) -> None:
    server = start_server(*TOY)
    system = [block(KEEPER, MARK)]
    ask(server, user(block("Who?")), system=system)
    kept(server, 1)
    server.stop()
    now = [0.0]
    store = Store(tmp_path / "cache", clock=lambda: now[0])
    (entry,) = store.entries()
    now[0] = entry.updated + 299
    store.index.touch(entry.key, now[0])
    now[0] += 299
    assert store.entries() == [entry]
    now[0] += 2
    assert store.entries() == []
    store.close()


def test_many_at_once_write_it_once(start_server: StartServer) -> None:
    server = start_server(*TOY)

    async def together() -> Sequence[Any]:
        async with anthropic.AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as client:
            asked = (
                client.messages.create(
                    model="toy", max_tokens=4, system=[block(KEEPER, MARK)], messages=[user(block(f"{i}?"))]
                )
                for i in range(8)
            )
            return await asyncio.gather(*asked)

    answers = asyncio.run(together())
    (cache,) = kept(server, 1)
    assert cache["version"] == 1
    assert all(counts(answer)[1] + counts(answer)[2] == cache["tokens"] for answer in answers)


def test_a_model_whose_states_are_used_whole_reads_them_too(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:can_cut=0")
    system = [block(KEEPER, MARK)]
    ask(server, user(block("Who?")), system=system)
    (cache,) = kept(server, 1)
    check_restart(server, user(block("Where?")), system=system, least=cache["tokens"])


def test_the_configured_system_message_moves_marks_along(start_server: StartServer, tmp_path: Path) -> None:
    config = tmp_path / "headstart.toml"
    config.write_text('default_system = "You look."\nmodels = {toy = "toy:"}\n')
    server = start_server("--config", str(config))
    first = ask(server, user(block(LETTER, MARK), block("Who?")))
    assert counts(first)[1] > len(LETTER) // 2
    tokens = kept(server, 1)[0]["tokens"]
    check_restart(server, user(block(LETTER, MARK), block("Where?")), least=tokens)


def test_each_token_is_counted_once() -> None:
    marked = BreakpointPlan(
        [
            PlacedBreakpoint(Content(), 100, 300),
            PlacedBreakpoint(Content(), 150, 3600),
            PlacedBreakpoint(Content(), 220, 300),
        ]
    )
    assert marked.written(0) == {300: 100 + 70, 3600: 50}
    assert marked.written(120) == {300: 70, 3600: 30}
    assert marked.written(300) == {300: 0, 3600: 0}
    half = BreakpointPlan(
        [PlacedBreakpoint(Content(), 100, 300, is_new=False), PlacedBreakpoint(Content(), 150, 3600)]
    )
    assert half.written(64) == {3600: 86}
    assert BreakpointPlan([PlacedBreakpoint(Content(), 100, 300, is_new=False)]).written(64) == {}


@pytest.mark.real_model
def test_a_real_model_reads_marks_after_a_restart_and_says_the_same(start_server: StartServer) -> None:
    server = start_server("--ctx", "2048")
    system = [block(KEEPER, MARK), block("Answer in one sentence.")]
    turn = user(block(LETTER, HOUR), block("Who was on board?"))
    first = ask(server, turn, system=system, model="smollm2")
    short, long = kept(server, 2)
    assert counts(first)[1:] == (long["tokens"], 0)
    other = user(block(LETTER, HOUR), block("When did the ship leave?"))
    check_restart(server, other, system=system, model="smollm2", least=long["tokens"])
    third = ask(server, user(block("Who are you?")), system=system, model="smollm2")
    assert short["tokens"] - 64 < counts(third)[2] <= short["tokens"]


@pytest.mark.real_model
def test_a_real_model_reads_marked_tools_without_a_system_prompt(start_server: StartServer) -> None:
    _check_tools_alone(start_server("--ctx", "2048"), "smollm2", -1)


@pytest.mark.real_model
def test_a_real_models_stream_tells_the_same_at_its_start_and_end(start_server: StartServer) -> None:
    _check_streams(start_server("--ctx", "2048"), "smollm2")
