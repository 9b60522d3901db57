"""Models for the NPU over HTTP, on the stand-in for Rockchip's runtime: it proves the protocol, not the
NPU."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import StartServer
from guide_requests import CREATES, CURLS, USES, addressed, cache_of, curl
from rkllm_models import tokenizer_files
from rkllm_standin import RELEASES, standin, standin_model
from servers import Json, RunningServer, events, eventually, running_server, said

# Servers for each of three releases of the runtime.
pytestmark = pytest.mark.slow

MODEL = "qwen3-0.6b"
PYTHON = "You are an expert in Python, and you answer in one line. " * 4
PIRATE = "You are the pirate of the seas, and you say arr at the end. " * 4


def npu_flags(folder: Path, release: str, *, weights: str = "a", name: str = MODEL) -> list[str]:
    folder.mkdir(exist_ok=True)
    path = standin_model(folder / "model.rkllm", weights=weights)
    tokenizer_files(folder)
    return ["--model", f"{name}={path}", "--rkllm-library", standin(release)]


newest = pytest.mark.parametrize("release", ["1.3.0"])


@pytest.fixture(params=RELEASES)
def release(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def switches(tmp_path: Path) -> Path:
    file = tmp_path / "switches"
    file.write_text("")
    return file


@pytest.fixture
def server(start_server: StartServer, tmp_path: Path, release: str, switches: Path) -> RunningServer:
    env = {"RKLLM_STANDIN_FILE": str(switches)}
    return start_server(*npu_flags(tmp_path / "model", release), env=env)


def hits(server: RunningServer, answer: Json) -> bool:
    """Whether the answer's account is that of a hit; or of a use that nobody can count."""
    usage = answer["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    if usage.get("cache_miss_reason") == "not_counted":
        return bool(usage["cache_hit"] is False and cached == 0)
    return bool(usage["cache_hit"] and cached > 0 and usage["cached_prompts"])


def ask(server: RunningServer, text: str, **more: object) -> Json:
    return server.chat(text, MODEL, **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=RELEASES)
def guide(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("guide")
    flags = [*npu_flags(folder / "model", request.param), "--ctx", "1024"]
    with running_server(folder / "cache", *flags) as server:
        server.answers = {title: curl(title, server) for title in CURLS}  # type: ignore[attr-defined]
        yield server


@pytest.mark.slow
def test_the_guides_requests_are_answered_and_hit(guide: RunningServer) -> None:
    answers: dict[str, Json] = guide.answers  # type: ignore[attr-defined]
    for title in CREATES:
        assert answers[title]["object"] == "cache.created"
        assert answers[title]["message"] == "Binary cache generated successfully"
    for title in USES:
        assert hits(guide, answers[title]), title
        assert said(answers[title])
    assert sorted(c["cache_name"] for c in answers["list"]["data"]) == sorted(map(cache_of, CREATES))
    assert answers["delete old_cache"]["deleted"] is True


def test_states_are_files_named_as_the_guide_has_them_beside_the_caches_own(guide: RunningServer) -> None:
    answers: dict[str, Json] = guide.answers  # type: ignore[attr-defined]
    folder = guide.cache_dir / MODEL
    kept = {cache_of(title): answers[title] for title in CREATES if title != "create old_cache"}
    expected = {
        f"{name}{suffix}"
        for name in kept
        for suffix in (".headstart", ".rkllm_cache", "@completion.rkllm_cache")
    }
    assert {path.name for path in folder.iterdir()} == expected
    for name, answer in kept.items():
        size = sum(path.stat().st_size for path in folder.glob(f"{name}[.@]*"))
        assert answer["size_mb"] == round(size / 1e6, 2)


@pytest.mark.slow
def test_the_guides_caches_hit_after_a_restart(guide: RunningServer) -> None:
    answers: dict[str, Json] = guide.answers  # type: ignore[attr-defined]
    guide.restart()
    for title in ("chat with coding_assistant", "complete with python_context"):
        again = curl(title, guide)
        assert hits(guide, again)
        if not again["usage"].get("cache_miss_reason"):
            assert again["timings"]["cache_source"] == "file"
        assert again["usage"]["prompt_tokens"] == answers[title]["usage"]["prompt_tokens"]


def test_the_start_up_script_creates_its_caches(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(*npu_flags(tmp_path / "model", "1.3.0"))
    names: dict[str, object] = {"__name__": "startup"}
    exec(addressed("startup.py", server).replace("import requests", "import httpx as requests"), names)
    made = [path for path in server.files() if path.endswith(".rkllm_cache") and "@" not in path]
    assert made == [f"{MODEL}/{name}.rkllm_cache" for name in ("coding", "debug", "system")]


def test_an_answer_is_the_same_with_a_cache_and_without(server: RunningServer) -> None:
    cold = ask(server, "What is it?", system=PYTHON, cache_prompt=False)
    server.create("python", PYTHON, MODEL)
    ask(server, "Something else entirely.")
    warm = ask(server, "What is it?", use_cache="python")
    assert said(warm) == said(cold)
    assert hits(server, warm)
    assert cold["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_two_caches_in_turn_hit_every_time(server: RunningServer) -> None:
    prompts = {"python": PYTHON, "pirate": PIRATE}
    for name, prompt in prompts.items():
        server.create(name, prompt, MODEL)
    expected = {
        name: ask(server, "Go.", system=prompt, cache_prompt=False) for name, prompt in prompts.items()
    }
    for _ in range(4):
        for name in prompts:
            answer = ask(server, "Go.", use_cache=name)
            assert hits(server, answer)
            assert said(answer) == said(expected[name])


@newest
def test_two_caches_together_are_one(server: RunningServer) -> None:
    server.create("python", PYTHON, MODEL)
    server.create("pirate", PIRATE, MODEL)
    both = ["python", "pirate"]
    first = ask(server, "Go.", use_cache=both)
    assert first["usage"]["cache_miss_reason"] == "first_use"
    eventually(lambda: hits(server, ask(server, "Go.", use_cache=both)))
    assert said(ask(server, "Go.", use_cache=both)) == said(first)


@newest
def test_completions_continue_a_cached_text(server: RunningServer) -> None:
    server.create("story", "Once upon a time there was the other th", MODEL)
    body = {"model": MODEL, "max_tokens": 12, "temperature": 0}
    whole = server.post(
        "/v1/completions",
        **body,
        prompt="Once upon a time there was the other thing",
        cache_prompt=False,
    ).json()
    warm = server.post("/v1/completions", **body, prompt="ing", use_cache="story").json()
    assert said(warm) == said(whole)
    assert hits(server, warm)


def test_a_stream_has_the_same_text_as_the_whole_answer(server: RunningServer, switches: Path) -> None:
    server.create("python", PYTHON, MODEL)
    whole = ask(server, "Go.", use_cache="python", max_tokens=60)
    switches.write_text("utf8=1,split=1")
    told = ask(server, "Go.", use_cache="python", max_tokens=60)
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Go."}],
        "use_cache": "python",
        "max_tokens": 60,
        "temperature": 0,
        "stream": True,
    }
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        chunks = list(events(response))
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == said(told)
    assert not text.isascii()
    assert said(whole).isascii()


@newest
def test_stop_strings_are_found_here(server: RunningServer) -> None:
    text = said(ask(server, "Go.", max_tokens=40))
    stop = text[5:8]
    answer = ask(server, "Go.", max_tokens=40, stop=[stop])
    assert said(answer) == text[: text.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert said(ask(server, "Go.", max_tokens=40)) == text


def test_a_client_that_leaves_frees_the_runtime(server: RunningServer, switches: Path) -> None:
    expected = said(ask(server, "Hello."))
    switches.write_text("decode_ms=50")
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Go."}],
        "stream": True,
        "temperature": 0,
    }
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        for _ in events(response):
            break
    switches.write_text("")
    assert said(ask(server, "Hello.")) == expected


def test_tools_are_written_by_the_models_template(start_server: StartServer, tmp_path: Path) -> None:
    flags = npu_flags(tmp_path / "model", "1.3.0")
    tokenizer_files(tmp_path / "model", template="tools")
    server = start_server(*flags)
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    with_tools = ask(server, "Go.", tools=[tool])["usage"]["prompt_tokens"]
    assert with_tools > ask(server, "Go.")["usage"]["prompt_tokens"] + 50


@newest
@pytest.mark.parametrize(
    ("file", "damage"),
    [
        *(("python.rkllm_cache", damage) for damage in ("flipped", "cut", "gone", "empty")),
        *(("python.headstart", damage) for damage in ("flipped", "cut", "empty")),
    ],
)
def test_a_damaged_cache_is_computed_again(server: RunningServer, file: str, damage: str) -> None:
    server.create("python", PYTHON, MODEL)
    expected = said(ask(server, "Go.", use_cache="python"))
    path = server.cache_dir / MODEL / file
    content = path.read_bytes()
    server.stop()
    if damage == "gone":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        at = len(content) // 2
        path.write_bytes(
            content[:at] + (bytes([content[at] ^ 4]) + content[at + 1 :] if damage == "flipped" else b"")
        )
    server.start()
    answer = ask(server, "Go.", use_cache="python")
    assert said(answer) == expected
    assert answer["usage"]["cache_miss_reason"] == "corrupt"
    assert hits(server, ask(server, "Go.", use_cache="python"))


@newest
def test_another_models_state_of_the_same_shape_is_never_loaded(
    start_server: StartServer, tmp_path: Path, release: str
) -> None:
    """The runtime itself would take it."""
    flags = [
        *npu_flags(tmp_path / "one", release, weights="a", name="one"),
        *npu_flags(tmp_path / "two", release, weights="b", name="two")[:2],
    ]
    server = start_server(*flags)
    for model in ("one", "two"):
        server.create("python", PYTHON, model)
    expected = said(server.chat("Go.", "one", use_cache="python"))
    theirs, ours = (server.cache_dir / model / "python.rkllm_cache" for model in ("two", "one"))
    assert theirs.stat().st_size == ours.stat().st_size
    shutil.copyfile(theirs, ours)
    answer = server.chat("Go.", "one", use_cache="python")
    assert answer["usage"]["cache_miss_reason"] == "corrupt"
    assert said(answer) == expected
    rebuilt = server.chat("Go.", "one", use_cache="python")
    assert rebuilt["usage"]["cache_hit"] is True, rebuilt
    # With its own file, too: that says whose cache it is.
    shutil.copyfile(theirs, ours)
    moved = (theirs.with_suffix(".headstart")).read_bytes()
    (ours.with_suffix(".headstart")).write_bytes(moved)
    chat = {"model": "one", "use_cache": "python", "messages": [{"role": "user", "content": "Go."}]}
    refused = server.post("/v1/chat/completions", **chat)
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "cache_not_found")
    assert ours.with_suffix(".headstart").read_bytes() == moved


def test_other_weights_under_the_same_name_have_the_caches_computed_again(
    start_server: StartServer, tmp_path: Path
) -> None:
    server = start_server(*npu_flags(tmp_path / "model", "1.3.0"))
    server.create("python", PYTHON, MODEL)
    server.stop()
    standin_model(tmp_path / "model" / "model.rkllm", weights="b")
    server.start()
    answer = ask(server, "Go.", use_cache="python")
    assert answer["usage"]["cache_miss_reason"] == "model_changed"
    assert ask(server, "Go.", use_cache="python")["usage"]["cache_hit"] is True


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (["--ctx", "2048"], "settings_changed"),
        (["--rkllm-library", "another"], "engine_changed"),
    ],
)
def test_another_context_or_release_has_them_computed_again(
    start_server: StartServer, tmp_path: Path, change: list[str], reason: str
) -> None:
    server = start_server(*npu_flags(tmp_path / "model", "1.3.0"))
    server.create("python", PYTHON, MODEL)
    server.stop()
    server.flags = (*server.flags, *change)
    if "another" in change:
        server.flags = (*server.flags[:-1], standin("1.2.3"))
    server.start()
    assert ask(server, "Go.", use_cache="python")["usage"]["cache_miss_reason"] == reason
    assert ask(server, "Go.", use_cache="python")["usage"]["cache_hit"] is True


def test_a_hit_is_not_claimed_that_the_runtime_does_not_count(server: RunningServer, switches: Path) -> None:
    server.create("python", PYTHON, MODEL)
    switches.write_text("reuse=none")
    usage = ask(server, "Go.", use_cache="python")["usage"]
    assert usage["cache_hit"] is False
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    assert usage["cache_miss_reason"] in ("restore_failed", "not_counted")


@newest
@pytest.mark.parametrize("fault", ["save=skip", "save=partial", "run=error", "run=fail"])
def test_a_cache_that_can_not_be_saved_is_an_error_and_leaves_nothing(
    server: RunningServer, switches: Path, fault: str
) -> None:
    switches.write_text(fault)
    response = server.post(f"/v1/cache/{MODEL}", cache_name="python", prompt=PYTHON)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "engine_error"
    assert server.files() == []
    switches.write_text("")
    assert server.create("python", PYTHON, MODEL)["object"] == "cache.created"


@pytest.mark.parametrize("fault", ["run=crash", "save=crash", "decode=crash"])
def test_a_crash_of_the_runtime_ends_its_worker_and_nothing_else(
    server: RunningServer, switches: Path, fault: str
) -> None:
    server.create("python", PYTHON, MODEL)
    expected = said(ask(server, "Go.", use_cache="python"))
    switches.write_text(fault)
    if fault == "save=crash":
        response = server.post(f"/v1/cache/{MODEL}", cache_name="pirate", prompt=PIRATE)
    else:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Go."}]}
        response = server.post("/v1/chat/completions", **body)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_died"
    switches.write_text("")
    ready = {"model": MODEL, "messages": [{"role": "user", "content": "Hi."}], "max_tokens": 1}
    eventually(lambda: server.post("/v1/chat/completions", **ready).status_code == 200)
    assert said(ask(server, "Go.", use_cache="python")) == expected


@newest
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", 7),
        ("min_p", 0.2),
        ("repeat_last_n", 5),
        ("n", 2),
        ("logit_bias", {"5": 1}),
        ("response_format", {"type": "json_object"}),
    ],
)
def test_a_parameter_that_the_runtime_does_not_have_is_refused_by_name(
    server: RunningServer, field: str, value: object
) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Go."}], field: value}
    response = server.post("/v1/chat/completions", **body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field


@newest
def test_parameters_that_ask_for_nothing_are_taken(server: RunningServer) -> None:
    harmless: Json = {"n": 1, "logprobs": False, "seed": None, "logit_bias": {}, "min_p": 0}
    ask(server, "Go.", **harmless, response_format={"type": "text"}, tool_choice="auto")


def test_sampling_that_can_not_be_had_for_one_request_is_warned_of(
    server: RunningServer, release: str
) -> None:
    answer = server.chat("Go.", MODEL, temperature=1.4)
    as_it_is = server.chat("Go.", MODEL, temperature=0.8)
    if release == "1.3.0":
        assert "sampling_warning" not in answer
    else:
        assert answer["sampling_warning"].startswith(
            "This NPU runtime samples all requests alike, with temperature"
        )
    assert "sampling_warning" not in as_it_is


def test_it_is_refused_where_the_settings_say_so(start_server: StartServer, tmp_path: Path) -> None:
    env = {
        "HEADSTART_RKLLM_OTHER_SAMPLING": "refuse",
        "HEADSTART_RKLLM_SAMPLING": '{"temperature": 0, "top_k": 10}',
    }
    server = start_server(*npu_flags(tmp_path / "model", "1.2.3"), env=env)
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Go."}]}
    refused = server.post("/v1/chat/completions", **body, temperature=0.7)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "temperature"
    assert server.post("/v1/chat/completions", **body, temperature=0, top_k=10).status_code == 200
    assert server.post("/v1/chat/completions", **body).status_code == 200


@newest
def test_keeping_listing_editing_and_deleting_work_as_for_other_models(server: RunningServer) -> None:
    server.create("python", PYTHON, MODEL, description="mine")
    created = server.http.get(f"/v1/cache/{MODEL}/python").json()
    edited = server.http.patch(f"/v1/cache/{MODEL}/python", json={"pinned": True}).json()
    assert (edited["pinned"], edited["description"], edited["size_mb"]) == (True, "mine", created["size_mb"])
    assert hits(server, ask(server, "Go.", use_cache="python"))
    again = server.create("python", PIRATE, MODEL)
    assert (again["object"], again["version"]) == ("cache.updated", 2)
    assert hits(server, ask(server, "Go.", use_cache="python"))
    only_chat = server.create("python", PIRATE, MODEL, **{"for": ["chat"]})
    assert list(only_chat["forms"]) == ["chat"]
    assert server.files() == [f"{MODEL}/python.headstart", f"{MODEL}/python.rkllm_cache"]
    assert server.http.delete(f"/v1/cache/{MODEL}/python").status_code == 200
    assert server.files() == []


@newest
def test_verify_finds_damage_and_repairs_it(server: RunningServer) -> None:
    server.create("python", PYTHON, MODEL)
    path = server.cache_dir / MODEL / "python@completion.rkllm_cache"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    stray = path.with_name("gone.rkllm_cache")
    stray.write_bytes(b"left behind")

    found = server.http.post("/v1/verify", json={}).text
    assert "not the state that belongs to" in found
    assert "holds a state whose cache is gone" in found
    repaired = server.http.post("/v1/verify", json={"repair": True}).text
    assert "rebuilt" in repaired
    assert not stray.exists()
    assert hits(server, ask(server, "Go.", use_cache="python"))


@newest
def test_states_given_up_for_others_are_computed_again(
    start_server: StartServer, tmp_path: Path, release: str
) -> None:
    flags = npu_flags(tmp_path / "model", release)
    server = start_server(*flags)
    size = server.create("python", PYTHON, MODEL)["size_mb"]
    server.stop()
    server.flags = (*server.flags, "--quota-mb", str(1.5 * size))
    server.start()
    server.create("pirate", PIRATE, MODEL)
    states = [path for path in server.files() if path.endswith(".rkllm_cache")]
    assert states == [f"{MODEL}/pirate.rkllm_cache", f"{MODEL}/pirate@completion.rkllm_cache"]
    answer = ask(server, "Go.", use_cache="python")
    assert answer["usage"]["cache_miss_reason"] == "evicted"
    assert hits(server, ask(server, "Go.", use_cache="python"))


@newest
def test_states_that_fit_nowhere_else_are_not_exported(server: RunningServer) -> None:
    server.create("python", PYTHON, MODEL)
    refused = server.http.get(f"/v1/cache/{MODEL}/python/file")
    assert refused.status_code == 400
    taken = server.http.put(
        f"/v1/cache/{MODEL}/other/file", content=(server.cache_dir / MODEL / "python.headstart").read_bytes()
    )
    assert (taken.status_code, taken.json()["error"]["code"]) == (400, "damaged_file")


@newest
def test_a_text_with_nul_is_refused(server: RunningServer) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "a\0b"}]}
    assert server.post("/v1/chat/completions", **body).status_code == 400


@pytest.mark.parametrize("missing", ["tokenizer.json", "library"])
def test_a_start_without_what_is_needed_says_what_it_is(
    start_server: StartServer, tmp_path: Path, missing: str
) -> None:
    flags = npu_flags(tmp_path / "model", "1.3.0")
    if missing == "library":
        flags[-1] = str(tmp_path / "librkllmrt.so")
    else:
        (tmp_path / "model" / missing).unlink()
    with pytest.raises(AssertionError, match=missing if missing != "library" else "librkllmrt.so"):
        start_server(*flags)
