"""The structure that the documents promise."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from fastapi.routing import APIRoute

import headstart
from headstart import errors
from headstart.api.anthropic import routes as messages
from headstart.api.caches import files as cache_files
from headstart.api.caches import routes as caches
from headstart.api.caches import verify
from headstart.api.completions import routes as completions
from headstart.api.models import routes as models
from headstart.api.responses import routes as responses
from headstart.api.tokens import embeddings
from headstart.api.tokens import tokenize as tokens
from headstart.config.settings import Settings

ROOT = Path(headstart.__file__).parent
# What each part may import of the others; a part is a package or a module of the top level.
BOTTOM = {"arithmetic", "errors", "config", "messages", "names", "tokens", "toyspec", "machine", "headstart"}
BOTTOM |= {"channel", "folder", "tables", "contents", "json_scan", "limits", "nesting", "regular"}
ALLOWED = {
    "errors": set(),
    "names": {"errors"},
    "tokens": set(),
    "channel": set(),
    "machine": set(),
    "folder": set(),
    "toyspec": set(),
    "arithmetic": set(),
    "messages": {"arithmetic"},
    "contents": {"limits", "nesting"},
    "limits": set(),
    "json_scan": {"limits"},
    "nesting": set(),
    "regular": set(),
    "tables": {"contents", "errors", "names", "regular"},
    "config": {"arithmetic", "contents", "errors", "folder", "names", "tables"},
    "engine": BOTTOM,
    "prompt": BOTTOM,
    "caches": BOTTOM,
    "service": BOTTOM | {"engine", "prompt", "caches"},
    "api": BOTTOM | {"service", "caches"},
    "cli": BOTTOM | {"service", "api"},
    "__init__": set(),
    "__main__": {"cli"},
}


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


MODULES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_lower_layers_never_import_higher_ones(path: Path) -> None:
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    wanted = {name.split(".")[1] for name in _imports(path) if name.startswith("headstart.")}
    assert wanted - {part} <= ALLOWED[part]


def test_llama_cpp_is_imported_in_two_files_only() -> None:
    users = [path for path in MODULES if any(name.startswith("llama_cpp") for name in _imports(path))]
    places = {str(path.relative_to(ROOT).parent) for path in users if path.name != "tokenizer.py"}
    assert places == {"engine/llama"}


def test_no_module_passes_300_lines() -> None:
    assert {path.name: n for path in MODULES if (n := len(path.read_text().splitlines())) > 300} == {}


def _tree(kind: type[errors.HeadstartError]) -> list[type[errors.HeadstartError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in _tree(child))]


def test_every_error_is_drawn_in_the_tree_with_its_status() -> None:
    drawn = {
        line.split()[0].strip("│├└─ "): line
        for line in (errors.__doc__ or "")
        .replace("│", " ")
        .replace("├──", "")
        .replace("└──", "")
        .splitlines()
        if line.split()
    }
    for kind in _tree(errors.HeadstartError):
        if kind.__module__ == errors.__name__ and kind is not errors.HeadstartError:
            assert kind.__name__ in drawn
            assert str(kind.status) in drawn[kind.__name__]


def test_every_error_tells_its_type_and_code() -> None:
    for kind in _tree(errors.HeadstartError):
        if kind.__module__ == errors.__name__ and kind is not errors.HeadstartError:
            assert kind.code
            assert kind.type in ("invalid_request_error", "server_error")
            assert (kind.status >= 500) == (kind.type == "server_error")


def test_every_setting_is_documented_with_its_default() -> None:
    text = (ROOT.parents[1] / "docs" / "settings.md").read_text()
    for name, field in Settings.model_fields.items():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
        default = {} if field.default_factory else field.default
        assert f"| `{str(default).lower() if isinstance(default, bool) else default}` |" in row
        assert field.description
        assert field.description in row


def test_every_route_is_documented() -> None:
    text = (ROOT.parents[1] / "docs" / "http-api.md").read_text()
    parts = (completions, responses, messages, embeddings, tokens, models, caches, cache_files, verify)
    routes = [route for part in parts for route in part.router.routes]
    assert len(routes) > 8
    for route in routes:
        assert isinstance(route, APIRoute)
        path = route.path.replace("{name:path}", "{name}").replace("/v1/models/{name}", "/v1/models/{model}")
        assert any(f"{method} {path}`" in text for method in route.methods or ()), route.path
