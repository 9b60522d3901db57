from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conftest import StartServer
from guide_requests import CREATES, CURLS, USES, addressed, cache_of, curl
from servers import ONE_THREAD, RunningServer, running_server

Json = dict[str, Any]

# Some of the guide's chats set no limit to their answers: the context does. The toy always has one.
MODELS = {
    "toy": ("--model", "toy=toy:eos=0", "--alias", "qwen3-0.6b=toy", "--ctx", "1024"),
    "smollm2": (*ONE_THREAD, "--alias", "qwen3-0.6b=smollm2", "--ctx", "192"),
}
both_models = pytest.mark.parametrize(
    "guide",
    ["toy", pytest.param("smollm2", marks=[pytest.mark.real_model, pytest.mark.timeout(600)])],
    indirect=True,
)


@dataclass
class Guide:
    """A server of `model` that was asked every curl of the guide, once and in order, and what it answered."""

    model: str
    server: RunningServer
    answers: dict[str, Json]

    def path(self, name: str) -> Path:
        return self.server.cache_dir / self.model / f"{name}.headstart"


@pytest.fixture(scope="module")
def guide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guide]:
    model: str = request.param
    with running_server(tmp_path_factory.mktemp("guide") / "cache", *MODELS[model]) as server:
        yield Guide(model, server, {title: curl(title, server) for title in CURLS})


@both_models
@pytest.mark.parametrize("title", CREATES)
def test_creating_a_cache_answers_as_the_guide_says(guide: Guide, title: str) -> None:
    answer = guide.answers[title]
    assert answer["object"] == "cache.created"
    assert answer["cache_name"] == cache_of(title)
    assert answer["ttft_ms"] > 0
    assert answer["message"] == "Binary cache generated successfully"
    assert isinstance(answer["size_mb"], float)


@both_models
@pytest.mark.parametrize("title", CREATES)
def test_a_created_cache_is_a_file_named_after_model_and_cache(guide: Guide, title: str) -> None:
    path = guide.path(cache_of(title))
    if title == "create old_cache":
        assert not path.exists(), "the guide deletes it"
    else:
        assert guide.answers[title]["size_mb"] == round(path.stat().st_size / 1e6, 2)


@both_models
@pytest.mark.parametrize("title", USES)
def test_every_request_that_names_a_cache_hits_it(guide: Guide, title: str) -> None:
    usage = guide.answers[title]["usage"]
    assert usage["cache_hit"] is True
    assert usage["cached_prompts"] == [cache_of(title)]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert 0 < usage["prompt_tokens_details"]["cached_tokens"] < usage["prompt_tokens"]


@both_models
@pytest.mark.parametrize("title", [title for title in USES if title != "complete with python_context"])
def test_a_chat_answers_with_a_message_of_the_assistant(guide: Guide, title: str) -> None:
    answer = guide.answers[title]
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "qwen3-0.6b"
    [choice] = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert isinstance(choice["message"]["content"], str)
    assert choice["finish_reason"] in ("stop", "length")
    if guide.model == "toy":
        assert choice["message"]["content"]


@both_models
def test_a_completion_answers_with_text(guide: Guide) -> None:
    answer = guide.answers["complete with python_context"]
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert answer["usage"]["completion_tokens"] <= 150
    [choice] = answer["choices"]
    assert isinstance(choice["text"], str)
    if guide.model == "toy":
        assert choice["text"]


@both_models
def test_the_list_names_every_cache_that_was_created(guide: Guide) -> None:
    listed = guide.answers["list"]
    assert listed["object"] == "list"
    assert sorted(entry["cache_name"] for entry in listed["data"]) == sorted(map(cache_of, CREATES))


@both_models
def test_the_deleted_cache_is_gone_and_the_others_are_not(guide: Guide) -> None:
    deleted = guide.answers["delete old_cache"]
    assert (deleted["cache_name"], deleted["deleted"]) == ("old_cache", True)
    names = [entry["cache_name"] for entry in curl("list", guide.server)["data"]]
    assert "old_cache" not in names
    assert "coding_assistant" in names


@both_models
def test_requests_hit_the_same_caches_after_a_restart(guide: Guide) -> None:
    guide.server.restart()
    for title in ("chat with coding_assistant", "complete with python_context"):
        before, after = guide.answers[title]["usage"], curl(title, guide.server)["usage"]
        assert after["cache_hit"] is True, title
        assert after["cached_prompts"] == [cache_of(title)]
        assert after["prompt_tokens"] == before["prompt_tokens"]
        # The state store may have more of the prompt than the cache.
        told = [usage["prompt_tokens_details"]["cached_tokens"] for usage in (before, after)]
        assert told[1] >= told[0]


def test_the_start_up_script_creates_its_caches(start_server: StartServer) -> None:
    server = start_server(*MODELS["toy"])
    script = addressed("startup.py", server).replace("import requests", "import httpx as requests")
    subprocess.run([sys.executable, "-c", script], check=True)
    assert server.files() == ["toy/coding.headstart", "toy/debug.headstart", "toy/system.headstart"]
