from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from chats import CUT, WHOLE, Kind
from driver import Driver, small_model
from headstart.engine.model import Model
from headstart.model_files import embedded_model
from servers import ONE_THREAD, RunningServer, running_server

# Measuring takes seconds: servers do without, but for the tests about it (tests/engine/test_tuning.py).
os.environ["HEADSTART_TUNE"] = "false"
# Engines in the tests' own process wait as those in workers do: spinning threads stand still beside others.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

StartServer = Callable[..., RunningServer]
Serve = Callable[..., RunningServer]
Report = Callable[[str], None]

ENGINES = ("toy", pytest.param("llama", marks=pytest.mark.real_model))
# For the tests of the engine where a real model's arithmetic could make a difference.
beside_smollm2 = pytest.mark.parametrize(
    "driver", [*ENGINES, pytest.param("smollm2", marks=pytest.mark.real_model)], indirect=True
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with servers of their own are slow, but for the first of each file, so that `make check` tries
    something of everything."""
    tried: set[Path] = set()
    for item in items:
        if "start_server" not in getattr(item, "fixturenames", ()) or _is_left_out(item):
            continue
        if item.path in tried:
            item.add_marker(pytest.mark.slow)
        tried.add(item.path)


def _is_left_out(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(name) for name in ("slow", "real_model"))


@pytest.fixture
def start_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StartServer]:
    """Starts servers that end with the test: `start_server("--model", "toy=toy:", cache_dir=...)`. Those with
    real models compute with one thread."""
    threads = ONE_THREAD if request.node.get_closest_marker("real_model") else ()
    with ExitStack() as stack:

        def start(
            *flags: str, cache_dir: Path | None = None, env: dict[str, str] | None = None
        ) -> RunningServer:
            directory = cache_dir or tmp_path / "cache"
            return stack.enter_context(running_server(directory, *threads, *flags, env=env))

        yield start


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with the toy model, shared: tests use names of their own and leave nothing running."""
    directory = tmp_path_factory.mktemp("toy") / "cache"
    with running_server(directory, "--model", "toy=toy:", "--alias", "qwen3-0.6b=toy") as server:
        yield server


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with SmolLM2, shared likewise; tests that use it are marked `real_model`."""
    directory = tmp_path_factory.mktemp("real") / "cache"
    with running_server(directory, *ONE_THREAD, "--alias", "qwen3-0.6b=smollm2") as server:
        yield server


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """llama.cpp with a tiny model, whose weights have SmolLM2's format."""
    import gguf

    import tiny_models

    path = tmp_path_factory.mktemp("llama") / "tiny.gguf"
    return small_model(str(tiny_models.written(path, "full", gguf.GGMLQuantizationType.Q4_1)))


@pytest.fixture(scope="session")
def smollm2() -> Model:
    return small_model(embedded_model())


@pytest.fixture(params=ENGINES)
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    model = small_model("toy:eos=0") if request.param == "toy" else request.getfixturevalue(request.param)
    driver = Driver(model)
    yield driver
    assert not driver.engine.busy


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Report:
    """Shows a line, such as what was counted, also where all tests pass."""

    def show(line: str) -> None:
        with capsys.disabled():
            print(f"\n    {line}")

    return show


@pytest.fixture(params=[CUT, WHOLE], ids=["cut", "whole"])
def kind(request: pytest.FixtureRequest) -> Kind:
    """A toy model whose states can be cut, and one whose states can't."""
    found: Kind = request.param
    return found


@pytest.fixture
def serve(start_server: StartServer, kind: Kind) -> Serve:
    """Starts servers of that model."""

    def start(*flags: str, cache_dir: Path | None = None, env: dict[str, str] | None = None) -> RunningServer:
        return start_server("--model", f"toy={kind[0]}", *flags, cache_dir=cache_dir, env=env)

    return start
