"""The structure that the documents promise."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from fastapi.routing import APIRoute

import headstart
from headstart import errors
from headstart.api.dialect import Dialect, dialect_of
from headstart.api.dialects import DIALECTS
from headstart.config.settings import Settings

ROOT = Path(headstart.__file__).parent
# What each part may import of the others; a part is a package or a module of the top level.
BOTTOM = {"numerics", "errors", "config", "protocol", "names", "tokens", "toyspec", "machine", "headstart"}
BOTTOM |= {
    "background",
    "channel",
    "model_files",
    "contents",
    "json_scan",
    "limits",
    "queues",
    "regular_files",
    "round_robin",
}
ALLOWED = {
    "errors": set(),
    "names": {"errors"},
    "tokens": set(),
    "channel": set(),
    "machine": set(),
    "model_files": {"errors", "toyspec"},
    "toyspec": set(),
    "numerics": set(),
    "protocol": {"numerics"},
    "contents": {"limits", "json_scan"},
    "limits": set(),
    "json_scan": {"limits"},
    "regular_files": set(),
    "queues": set(),
    "round_robin": set(),
    "config": {"numerics", "contents", "errors", "model_files", "names", "regular_files"},
    "engine": BOTTOM,
    "prompt": BOTTOM,
    "caches": BOTTOM,
    "service": BOTTOM | {"engine", "prompt", "caches"},
    "doctor": BOTTOM | {"service", "engine", "prompt", "caches"},
    "telemetry": BOTTOM | {"service"},
    "api": BOTTOM | {"service", "caches", "telemetry"},
    "cli": BOTTOM | {"service", "doctor", "api", "telemetry"},
    "__init__": set(),
    "__main__": {"cli"},
}
# Folders of the service from the bottom up: each may import those before it.
SERVICE_FLOORS = (
    ("background", "interface"),
    ("models",),
    ("caching",),
    ("origins",),
    ("generation",),
    ("log_observer",),
    ("service",),
)
# The modules of a dialect that generates.
MODULES_OF_A_DIALECT = {"routes", "request", "response", "schema"}
MOST_MODULES = 14


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(_parsed(path)):
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


def _folders(path: Path, package: str) -> set[str]:
    """The folders or modules of a package that the module imports."""
    prefix = f"headstart.{package}."
    return {name.removeprefix(prefix).split(".")[0] for name in _imports(path) if name.startswith(prefix)}


@pytest.mark.parametrize("path", sorted((ROOT / "service").rglob("*.py")), ids=lambda path: path.stem)
def test_floors_of_the_service_import_downwards_only(path: Path) -> None:
    floor = path.relative_to(ROOT / "service").parts[0].removesuffix(".py")
    if floor == "__init__":
        return
    (number,) = [i for i, floors in enumerate(SERVICE_FLOORS) if floor in floors]
    below = {name for floors in SERVICE_FLOORS[:number] for name in floors}
    assert _folders(path, "service") - {floor} <= below


def _folder(dialect: Dialect) -> str:
    (folder,) = {_module(route).split(".")[2] for route in _routes(dialect)}
    return folder


def _routes(dialect: Dialect) -> list[APIRoute]:
    routes = [route for router in dialect.routers for route in router.routes]
    assert all(isinstance(route, APIRoute) for route in routes)
    return [route for route in routes if isinstance(route, APIRoute)]


def _module(route: APIRoute) -> str:
    return str(route.endpoint.__module__)


FOLDERS = {_folder(dialect) for dialect in DIALECTS}
GENERATING = [dialect for dialect in DIALECTS if dialect.generates]


def test_every_folder_of_routes_is_in_the_list_once() -> None:
    found = {path.parent.name for path in (ROOT / "api").glob("*/dialect.py")}
    assert len(FOLDERS) == len(DIALECTS)
    assert found == FOLDERS


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_dialects_never_import_each_other(folder: str) -> None:
    for path in (ROOT / "api" / folder).glob("*.py"):
        assert _folders(path, "api") & FOLDERS <= {folder}, path


def test_only_the_list_of_dialects_imports_from_their_folders() -> None:
    others = [path for path in (ROOT / "api").rglob("*.py") if path.parent.name not in FOLDERS]
    assert [path.name for path in others if _folders(path, "api") & FOLDERS] == ["dialects.py"]


@pytest.mark.parametrize("dialect", DIALECTS, ids=_folder)
def test_the_path_of_a_route_tells_its_dialect(dialect: Dialect) -> None:
    for route in _routes(dialect):
        assert dialect_of(route.path, DIALECTS) is dialect
        if route.path.startswith("/v1/"):
            assert dialect_of(f"/prefix{route.path}", DIALECTS) is dialect
    for prefix in dialect.prefixes:
        assert dialect_of(f"{prefix}-other", DIALECTS) is None


@pytest.mark.parametrize("dialect", GENERATING, ids=_folder)
def test_a_dialect_that_generates_is_complete(dialect: Dialect) -> None:
    """Its folder has the four modules; each route that streams has a table and is tested."""
    assert {path.stem for path in (ROOT / "api" / _folder(dialect)).glob("*.py")} >= MODULES_OF_A_DIALECT
    tables = (ROOT.parents[1] / "docs" / "compatibility.md").read_text().splitlines()
    tests = [path.read_text() for path in Path(__file__).parent.glob("api/test_*.py")]
    streamed = [path for (_, path), answer in dialect.answers.items() if answer.event]
    assert streamed
    for path in streamed:
        assert f"## POST {path}" in tables
        assert any(f'"{path}"' in test for test in tests), path


def test_no_folder_has_more_modules_than_one_sees_at_once() -> None:
    counts = Counter(path.parent for path in MODULES if path.name not in ("__init__.py", "__main__.py"))
    assert {str(folder): n for folder, n in counts.items() if n > MOST_MODULES} == {}


def test_llama_cpp_is_imported_in_two_files_only() -> None:
    users = [path for path in MODULES if any(name.startswith("llama_cpp") for name in _imports(path))]
    places = {str(path.relative_to(ROOT).parent) for path in users if path.name != "llama_tokenizer.py"}
    assert places == {"engine/llama"}


HEADLESS = re.compile(r"(What|Those|Where|Which|Whatever|Of|By)\b")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_begin_with_their_subject(path: Path) -> None:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(_parsed(path)) if isinstance(node, kinds)]
    assert [text for node in nodes if HEADLESS.match(text := ast.get_docstring(node) or "")] == []


GERUNDS = {"chunking", "pooling", "sampling", "reasoning", "caching", "answering", "tracing"}
PARTICIPLES = {"verified", "derived", "declared", "removed"}


def test_modules_are_nouns_or_imperatives() -> None:
    """The exceptions are nouns, or say of which caches a module is."""
    named = {path.stem for path in MODULES if re.search(r"(ing|ed)$", path.stem)}
    assert named == GERUNDS | PARTICIPLES


def test_class_names_are_unique() -> None:
    """Names in modules called schema or reply are those of /openapi.json."""
    trees = [_parsed(path) for path in MODULES if path.stem not in ("schema", "reply")]
    names = Counter(node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    names += Counter(name for tree in trees for name in _aliases(tree))
    assert [name for name, n in names.items() if n > 1] == []


def _aliases(tree: ast.Module) -> list[str]:
    """The names that a module gives to sets of values."""
    assigned = [node for node in tree.body if isinstance(node, ast.Assign) and len(node.targets) == 1]
    sets = [node for node in assigned if ast.unparse(node.value).startswith("Literal[")]
    return [ast.unparse(node.targets[0]) for node in sets]


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
    routes = [route for dialect in DIALECTS for route in _routes(dialect)]
    assert len(routes) > 8
    for route in routes:
        path = route.path.replace("{name:path}", "{name}").replace("/v1/models/{name}", "/v1/models/{model}")
        assert any(f"{method} {path}`" in text for method in route.methods or ()), route.path


def test_child_processes_import_nothing_from_the_current_folder() -> None:
    """`module_command` sees to it, and starts all of them."""
    starts = re.compile(r"sys\.executable|create_subprocess_exec\(|subprocess\.(run|Popen|call|check_\w+)\(")
    places = {path for path in MODULES if starts.search(path.read_text())}
    assert len(places) >= 7
    for path in places - {ROOT / "machine.py"}:
        assert "sys.executable" not in path.read_text()
        assert "module_command(" in path.read_text(), path


def test_the_kind_of_a_model_is_asked_in_two_places() -> None:
    """The others ask the kind's record in `engine/kinds.py`."""
    askers = [path for path in MODULES if re.search(r"\bkind_of\(", path.read_text())]
    names = {str(path.relative_to(ROOT)) for path in askers}
    assert names == {"model_files.py", "engine/kinds.py", "prompt/tokenizer.py"}


@pytest.mark.parametrize("module", ["headstart.engine.worker", "headstart.engine.kinds"])
def test_native_libraries_are_imported_when_they_are_needed(module: str) -> None:
    heavy = ["llama_cpp", "llguidance", "numpy"]
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
