"""`headstart demo`: what it claims must be what the server says."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from conftest import StartServer
from headstart.cli.client import Client, RequestFailed
from headstart.cli.examples import GUIDE_EXAMPLES, long_example
from headstart.cli.local import own_server
from headstart.cli.main import app
from headstart.cli.measure import BenchRun
from servers import WITHOUT_STORE

NOBODY = "http://127.0.0.1:1"
STEPS = [
    "Prefill system prompt",
    "Load",
    "Prefill new messages",
    "Generate tokens",
    "Total TTFT",
    "Total time",
]
TOY = {"HEADSTART_MODELS": '{"toy": "toy:ctx=8192"}'}


def check_story(output: str) -> None:
    """All three examples and the long prompt hit their caches, and the table has the guide's rows."""
    sections = re.split(r"^(?:Example \d|Breakdown): ", output, flags=re.MULTILINE)
    assert len(sections) == 5
    for section in sections[1:]:
        found = re.search(r"cache_hit true, cached_tokens ([\d,]+) of ([\d,]+) prompt tokens", section)
        assert found, section
        cached, prompt = (int(number.replace(",", "")) for number in found.groups())
        assert 0 < cached < prompt
        assert re.search(r"TTFT +[\d.,]+ ms without the cache, [\d.,]+ ms with it: \d+% (less|more)", section)
        assert "Same answer  yes" in section
    table = [line.strip("| ").split("|") for line in output.splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in table[2:]] == STEPS
    assert re.search(r"^(Saves|Costs) [\d,]+ seconds per 1,000 requests", output, re.MULTILINE)
    assert max(map(len, output.splitlines())) <= 80


def processes() -> set[psutil.Process]:
    """All that this process has started. Those of earlier tests may end at any time."""
    return set(psutil.Process().children(recursive=True))


@pytest.mark.slow
def test_the_demo_uses_a_running_server_and_leaves_it_as_it_was(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:ctx=8192", "--alias", "other=toy")
    server.create("coding_assistant", "The user's own cache of this name.")
    before = server.http.get("/v1/cache").json() | {"store": None}
    known = processes()
    result = CliRunner().invoke(app, ["demo", "--url", server.url, "--model", "other"], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"Headstart demo: other at {server.url}, which was running\n")
    check_story(result.stdout)
    assert server.http.get("/v1/cache").json() | {"store": None} == before
    assert processes() <= known


@pytest.mark.slow
def test_the_demo_starts_a_server_when_none_runs_and_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    known = processes()
    monkeypatch.setenv("HEADSTART_URL", NOBODY)
    result = CliRunner().invoke(app, ["demo"], env={**TOY, "COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    assert "started for this demo" in result.stdout
    check_story(result.stdout)
    assert processes() <= known


def test_a_model_that_the_server_does_not_have_is_an_error(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    result = CliRunner().invoke(app, ["demo", "--url", server.url, "--model", "nosuch"])
    assert result.exit_code == 1
    assert "nosuch" in result.stderr


@pytest.mark.slow
def test_a_server_that_can_not_start_says_why() -> None:
    with pytest.raises(RequestFailed, match=r"/nowhere\.gguf"), own_server("--model", "x=/nowhere.gguf"):
        pass


@pytest.fixture
def interruptible() -> Iterator[None]:
    """What a shell starts in the background ignores SIGINT, and so would all that the tests start."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.slow
def test_an_interrupted_demo_leaves_nothing_behind(number: signal.Signals, tmp_path: Path) -> None:
    environment = {**os.environ, "HEADSTART_MODELS": '{"toy": "toy:ctx=8192,ms_per_token=2"}'}
    process = subprocess.Popen(
        [sys.executable, "-m", "headstart", "demo", "--url", NOBODY],
        env={**environment, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process:
        assert "started for this demo" in process.stdout.readline()
        descendants = psutil.Process(process.pid).children(recursive=True)
        # The server, the model's worker and its prompt process.
        assert len(descendants) == 3
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert "Traceback" not in errors
    assert psutil.wait_procs(descendants, timeout=10)[1] == []
    assert list(tmp_path.iterdir()) == []


def test_runs_with_a_cache_load_it_from_its_file(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:", env=WITHOUT_STORE)
    with Client(server.url) as client, BenchRun(client) as bench:
        comparison = bench.compare(GUIDE_EXAMPLES[0], 3)
        bench.fill_slots()
        afterwards = server.chat("Hi", system=GUIDE_EXAMPLES[0].prefix)
    assert afterwards["timings"]["cache_source"] == "file", "a slot would have been taken first"
    assert [run.usage["cache_hit"] for run in comparison.with_cache] == [True] * 3
    assert all(run.cached_tokens == 0 for run in comparison.without)
    for run in (*comparison.with_cache, *comparison.without):
        assert 0 < run.ttft_ms <= run.total_ms
        assert run.timings["prompt_n"] + run.cached_tokens == run.usage["prompt_tokens"]


@pytest.mark.real_model
def test_the_demo_with_the_real_model_hits_every_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once each, with short answers, and with the beginning of the long prompt."""
    for constant in ("EXAMPLE_RUNS", "BREAKDOWN_RUNS"):
        monkeypatch.setattr(f"headstart.cli.demo.{constant}", 1)
    monkeypatch.setattr("headstart.cli.measure.ANSWER_TOKENS", 12)
    example = long_example()
    shorter = replace(example, prefix=example.prefix[:1200])
    monkeypatch.setattr("headstart.cli.demo.long_example", lambda: shorter)
    result = CliRunner().invoke(
        app, ["demo", "--url", NOBODY], env={"COLUMNS": "80", "HEADSTART_THREADS": "1"}
    )
    assert result.exit_code == 0, result.output
    assert "smollm2" in result.stdout
    check_story(result.stdout)
