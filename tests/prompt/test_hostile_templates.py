"""Chat templates that compute without end or stumble fail their requests alone, with the reason."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import StartServer
from headstart.errors import BadRequest
from headstart.prompt.template import ChatTemplate
from servers import RunningServer, running_server

SAID = "{% for m in messages %}{{ m.content }} {% endfor %}"
BOOM = "{% set n = namespace(x='a') %}{% for i in range(90) %}{% set n.x = n.x + n.x %}{% endfor %}"
TREES = (
    "{% set n = namespace(a=[1], b=[1]) %}{% for i in range(60) %}{% set n.a = [n.a, n.a] %}"
    "{% set n.b = [n.b, n.b] %}{% endfor %}{{ n.a == n.b }}"
)
# With any messages, and what is told of it.
FAILING = {
    "zero": ("{{ 1/0 }}", "division by zero"),
    "range": ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
    "nested": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "more than 2 seconds",
    ),
    "repeated": ("{{ 'a' * 10**10 }}", "repetition of more than"),
    "doubled": (BOOM, "MemoryError"),
    "power": ("{{ 10**1000000000 }}", "power of more than"),
    "rounded": ("{{ 1.5|round(10**9, 'ceil') }}", "rounding to more than"),
    "padded": ("{{ 'a'|center(10**10) }}", "MemoryError"),
    "recursive": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    "endless": (
        "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
        "writes more than 4194304 characters",
    ),
    "class": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "attribute": ("{{ messages[0].content.nothing.at.all }}", "has no attribute"),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with a toy model for each of the templates, and one whose template is good."""
    folder = tmp_path_factory.mktemp("templates")
    sources = {name: source for name, (source, _) in FAILING.items()}
    sources |= {
        "trees": TREES,
        "words": "{{ raise_exception('never') }}",
        "zero_at": SAID + "{{ 1 / (messages|length - 2) }}",
    }
    for name, source in sources.items():
        (folder / name).write_text(source)
    flags = [f"--model={name}=toy:" for name in ["toy", *sources]]
    paths = json.dumps({name: str(folder / name) for name in sources})
    with running_server(folder / "cache", *flags, env={"HEADSTART_TEMPLATES": paths}) as running:
        yield running


def _ask(server: RunningServer, model: str, n_messages: int = 1) -> tuple[int, dict[str, Any]]:
    message = {"role": "user", "content": "Hello"}
    body = {"model": model, "messages": [message] * n_messages, "max_tokens": 2}
    response = server.post("/v1/chat/completions", **body)
    return response.status_code, response.json().get("error", {})


@pytest.mark.slow
@pytest.mark.parametrize("name", FAILING)
def test_a_template_that_can_write_no_chat_is_its_models_fault(server: RunningServer, name: str) -> None:
    for _ in range(2):
        status, error = _ask(server, name)
        assert status == 503, error
        assert error["code"] == "unavailable"
        assert FAILING[name][1] in error["message"]
        # The process has not ended for it, and the model is good for all else.
        assert server.post("/v1/completions", model=name, prompt="Hello", max_tokens=2).status_code == 200
    assert _ask(server, "toy")[0] == 200


@pytest.mark.slow
def test_a_template_that_hangs_where_nothing_can_stop_it_is_its_models_fault(server: RunningServer) -> None:
    status, error = _ask(server, "trees")
    assert (status, error["code"]) == (503, "unavailable")
    assert "processor's time" in error["message"]
    assert _ask(server, "toy")[0] == 200


def test_what_a_template_refuses_itself_is_the_requests_fault(server: RunningServer) -> None:
    status, error = _ask(server, "words")
    assert (status, error["param"]) == (400, "messages")
    assert error["message"] == "The model's chat template refuses these messages: never"


def test_what_fails_with_some_messages_only_is_the_requests_fault(server: RunningServer) -> None:
    assert _ask(server, "zero_at")[0] == 200
    status, error = _ask(server, "zero_at", n_messages=2)
    assert (status, error["param"]) == (400, "messages")
    assert error["message"] == "The model's chat template refuses these messages: division by zero"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/apply-template"])
def test_arguments_nested_deeper_than_can_be_written_are_refused(toy: RunningServer, path: str) -> None:
    deep = "[" * 10_000 + "]" * 10_000
    function = {"name": "f", "arguments": '{"a": ' + deep + "}"}
    call = {"id": "a", "type": "function", "function": function}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "1"},
    ]
    response = toy.post(path, model="toy", messages=messages)
    assert response.status_code == 400, response.text


def test_any_exception_in_a_template_is_told() -> None:
    """Also of those that Jinja's own filters raise now and then."""
    for source in (
        "{{ 1/0 }}",
        "{{ [1, 'a']|sort }}",
        "{{ 'x'|int(base=99)|attr(1) }}",
        "{{ {}|first|round }}",
    ):
        with pytest.raises(BadRequest, match="refuses these messages"):
            ChatTemplate(source, "", "").render([{"role": "user", "content": "Hi"}])


def test_products_and_powers_have_a_limit_only_where_they_are_large() -> None:
    source = "{{ '=' * 20 }}{{ 3 * 4 }}{{ 2 ** 10 }}{{ 1.5 * 2 }}{{ 2 ** 0.5 > 1 }}{{ [1] * 2 }}"
    text = ChatTemplate(source, "", "").render([{"role": "user", "content": "Hi"}])
    assert text == "=" * 20 + "12" + "1024" + "3.0" + "True" + "[1, 1]"


@pytest.mark.slow
def test_a_broken_template_file_ends_the_start(start_server: StartServer, tmp_path: Path) -> None:
    (tmp_path / "broken").write_text("{% for %}")
    env = {"HEADSTART_TEMPLATES": json.dumps({"toy": str(tmp_path / "broken")})}
    with pytest.raises(AssertionError, match="not valid Jinja"):
        start_server("--model", "toy=toy:", env=env)
