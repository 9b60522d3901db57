"""/metrics counts what requests say of themselves, under vLLM's names where it has the same thing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from conftest import StartServer
from servers import RunningServer, eventually, running_server

CHAT = "/v1/chat/completions"
PROMPT = "You keep the lighthouse and answer in few words. " * 20
DOCS = Path(__file__).parents[2] / "docs"
Json = dict[str, Any]


class Scrape:
    """The metrics of a server at one time."""

    def __init__(self, http: httpx.Client) -> None:
        response = http.get("/metrics")
        assert response.status_code == 200, response.text
        self.text = response.text
        families = list(text_string_to_metric_families(response.text))
        self.samples = [sample for family in families for sample in family.samples]

    def get(self, name: str, **labels: str) -> float:
        """The sum of all samples of this name with these labels."""
        fitting = [s for s in self.samples if s.name == name and labels.items() <= s.labels.items()]
        return sum(sample.value for sample in fitting)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("metrics") / "cache", "--model", "toy=toy:eos=0") as server:
        yield server


def _chat(server: RunningServer, **more: Any) -> Json:
    body = {"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 6, **more}
    response = server.post(CHAT, model="toy", **body)
    assert response.status_code == 200, response.text
    answer: Json = response.json()
    return answer


def _change(server: RunningServer, act: Callable[[], Any]) -> Callable[..., float]:
    """Runs `act`; returns a function of the change of a metric meanwhile."""
    before = Scrape(server.http)
    act()
    after = Scrape(server.http)
    return lambda name, **labels: after.get(name, **labels) - before.get(name, **labels)


def test_tokens_and_answers_are_counted_as_requests_report_them(server: RunningServer) -> None:
    server.create("keeper", PROMPT)
    answers: list[Json] = []

    def ask() -> None:
        answers.extend(_chat(server, use_cache="keeper") for _ in range(3))
        answers.append(_chat(server, n=2))
        answers.append(_chat(server, cache_prompt=False))

    change = _change(server, ask)
    usages = [answer["usage"] for answer in answers]
    prompt = sum(usage["prompt_tokens"] for usage in usages)
    cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    generated = sum(usage["completion_tokens"] for usage in usages)
    assert cached > 0
    toy = {"model_name": "toy"}
    assert change("vllm:prompt_tokens_total", **toy) == prompt
    assert change("vllm:prompt_tokens_cached_total", **toy) == cached
    assert change("vllm:prompt_tokens_by_source_total", source="local_compute", **toy) == prompt - cached
    assert change("vllm:prompt_tokens_by_source_total", source="local_cache_hit", **toy) == cached
    assert change("vllm:prefix_cache_queries_total", **toy) == prompt
    assert change("vllm:prefix_cache_hits_total", **toy) == cached
    assert change("vllm:generation_tokens_total", **toy) == generated
    reasons = [choice["finish_reason"] for answer in answers for choice in answer["choices"]]
    for reason in ("stop", "length"):
        assert change("vllm:request_success_total", finished_reason=reason) == reasons.count(reason)
    assert change("headstart_cache_hits_total") + change("headstart_cache_misses_total") == len(answers)
    assert change("headstart_tokens_saved_total") == cached
    assert change("headstart_seconds_saved_total") > 0
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_prefill_time"):
        assert change(f"vllm:{name}_seconds_count", **toy) == len(answers)
    n_answers = sum(len(answer["choices"]) for answer in answers)
    assert change("vllm:inter_token_latency_seconds_count") == generated - n_answers


def test_misses_are_counted_by_reason_and_hits_by_tier(server: RunningServer) -> None:
    server.create("missed", PROMPT)
    change = _change(server, lambda: _chat(server, use_cache="missed", cache_prompt=False))
    assert change("headstart_cache_misses_total", reason="cache_prompt_false") == 1
    assert change("headstart_cache_hits_total") == 0
    change = _change(server, lambda: [_chat(server, use_cache="missed") for _ in range(2)])
    assert change("headstart_cache_hits_total", model_name="toy") == 2
    assert change("headstart_cache_hits_total", tier="slot") >= 1


def test_an_answer_that_its_client_leaves_is_an_abort(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:ms_per_token=5,eos=0")

    def leave() -> None:
        body = {"model": "toy", "messages": [{"role": "user", "content": "x"}], "stream": True}
        with server.http.stream("POST", CHAT, json=body) as response:
            lines = response.iter_lines()
            next(lines)
            assert Scrape(server.http).get("vllm:num_requests_running", model_name="toy") == 1
            assert 0 < Scrape(server.http).get("vllm:kv_cache_usage_perc", model_name="toy") < 1
        eventually(lambda: Scrape(server.http).get("vllm:num_requests_running") == 0)

    change = _change(server, leave)
    assert change("vllm:request_success_total", finished_reason="abort") == 1
    assert change("vllm:request_success_total") == 1


def test_builds_evictions_and_deaths_of_workers_are_counted(
    start_server: StartServer, toy: RunningServer
) -> None:
    size = toy.create("metrics-size", PROMPT)["size_mb"]
    server = start_server("--model", "toy=toy:", "--quota-mb", str(2.5 * size))

    def evict() -> None:
        for name in ("one", "two", "three"):
            server.create(name, f"{name} {PROMPT}")

    change = _change(server, evict)
    assert change("headstart_build_seconds_count", model_name="toy") == 3
    assert change("headstart_evictions_total", origin="client") >= 1
    assert change("headstart_evicted_bytes_total") > 0
    files = sum(path.stat().st_size for path in server.cache_dir.glob("toy/*.headstart"))
    assert Scrape(server.http).get("headstart_store_bytes", model_name="toy", tier="disk") == files
    server.workers()[0].kill()
    eventually(lambda: Scrape(server.http).get("headstart_worker_restarts_total", model_name="toy") == 1)
    eventually(lambda: server.http.get("/ready").status_code == 200)


def test_a_damaged_state_is_a_failed_verification(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    server.create("keeper", PROMPT)
    (path,) = server.cache_dir.glob("toy/keeper.headstart")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    change = _change(server, lambda: _chat(server, use_cache="keeper"))
    assert change("headstart_verify_failures_total") == 1
    assert change("headstart_cache_misses_total", reason="corrupt") == 1


def test_the_state_store_is_measured_as_it_tells(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:eos=0", "--model", "other=toy:weights=other")

    def both_kept() -> bool:
        tiers = server.http.get("/v1/cache").json()["store"]
        scrape, held = Scrape(server.http), "headstart_state_bytes"
        kept = [scrape.get(held, model_name="toy", tier=tier) for tier in ("memory", "disk")]
        return bool(kept[0]) and kept == [tiers[tier]["bytes"] for tier in ("memory", "disk")]

    for question in ("Who?", "When?", "Where?"):
        _chat(server, messages=[{"role": "user", "content": f"{question} {PROMPT}"}])
    eventually(both_kept)
    assert Scrape(server.http).get("headstart_state_park_seconds_total", model_name="toy") > 0
    for name in ("evictions", "verify_failures"):
        assert Scrape(server.http).get(f"headstart_state_{name}_total") == 0
    eventually(lambda: server.post("/v1/models/unload", model="toy").status_code == 200)
    eventually(lambda: Scrape(server.http).get("headstart_state_bytes", model_name="toy", tier="disk") > 0)
    assert Scrape(server.http).get("headstart_state_bytes", tier="memory") == 0


KEYS = """
keys = {root = {key = "root-secret", admin = true}, bob = {key = "bob-secret"}}
"""


@pytest.mark.parametrize("is_public", [False, True])
def test_metrics_are_for_admins_unless_they_are_public(
    start_server: StartServer, tmp_path: Path, is_public: bool
) -> None:
    config = tmp_path / "headstart.toml"
    config.write_text(f"metrics_public = {str(is_public).lower()}\n{KEYS}")
    server = start_server("--config", str(config), "--model", "toy=toy:")
    answers = {
        who: server.http.get("/metrics", headers={"authorization": f"Bearer {who}-secret"}).status_code
        for who in ("root", "bob", "nobody")
    }
    otherwise = {"bob": 403, "nobody": 401} if not is_public else {"bob": 200, "nobody": 200}
    assert answers == {"root": 200, **otherwise}


def test_the_server_lives_before_it_is_ready(start_server: StartServer) -> None:
    server = start_server("--model", "toy=toy:")
    for path, status in (("/health", "ok"), ("/ready", "ready")):
        answer = server.http.get(path)
        assert (answer.status_code, answer.json()["status"]) == (200, status)
    server.workers()[0].kill()
    eventually(lambda: server.http.get("/ready").status_code == 503)
    assert server.http.get("/health").status_code == 200
    eventually(lambda: server.http.get("/ready").status_code == 200)


def _documented() -> set[str]:
    text = (DOCS / "metrics.md").read_text()
    return set(re.findall(r"^\| `([\w:]+)` \|", text, flags=re.MULTILINE))


def _families(text: str) -> set[str]:
    """Names as written in queries: counters end with _total."""
    kinds = dict(re.findall(r"^# TYPE (\S+) (\w+)$", text, flags=re.MULTILINE))
    return {name for name in kinds if not name.endswith("_created")}


def test_every_metric_is_documented(server: RunningServer) -> None:
    assert _families(Scrape(server.http).text) == _documented()


def test_the_dashboard_shows_metrics_that_there_are(server: RunningServer) -> None:
    board = json.loads((DOCS / "grafana" / "headstart.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    shown = {name for query in queries for name in re.findall(r"(?:vllm:|headstart_)\w+", query)}
    known = _families(Scrape(server.http).text)
    known |= {name + end for name in known for end in ("_bucket", "_sum", "_count")}
    assert shown
    assert shown <= known


@pytest.mark.prometheus
def test_prometheus_itself_scrapes_the_server(start_server: StartServer, tmp_path: Path) -> None:
    program = shutil.which("prometheus")
    assert program, "Prometheus is missing: apt-get install prometheus"
    server = start_server("--model", "toy=toy:")
    _chat(server)
    host = server.url.removeprefix("http://")
    config = tmp_path / "prometheus.yml"
    scrape = {"job_name": "headstart", "scrape_interval": "1s", "static_configs": [{"targets": [host]}]}
    config.write_text(json.dumps({"scrape_configs": [scrape]}))
    address = "127.0.0.1:19090"
    command = [program, f"--config.file={config}", f"--storage.tsdb.path={tmp_path}/data"]
    with subprocess.Popen([*command, f"--web.listen-address={address}"], stderr=subprocess.DEVNULL) as run:
        try:
            assert _asked_of_prometheus(address, 'vllm:prompt_tokens_total{model_name="toy"}') > 0
            assert _asked_of_prometheus(address, 'up{job="headstart"}') == 1
        finally:
            run.terminate()


def _asked_of_prometheus(address: str, query: str) -> float:
    """The value of a query, as soon as there is one."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            answer = httpx.get(f"http://{address}/api/v1/query", params={"query": query}).json()
            if results := answer["data"]["result"]:
                return float(results[0]["value"][1])
        except (httpx.TransportError, KeyError, ValueError):
            pass
        time.sleep(0.5)
    raise AssertionError(f"Prometheus has no value for {query}")
