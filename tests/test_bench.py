"""What the benchmark claims about itself, on the toy model and on made-up samples."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

import peer_build
from bench import random_model, report
from bench.__main__ import ARMS, options, run_arm
from bench.client import BenchFailed, Connection, Reply
from bench.cost import step_ms
from bench.lab import Lab, Sample
from bench.servers import Headstart, Host, check_cold, check_hit
from bench.statistics import paired_ratios, percentile, summary
from bench.targets import TARGETS, Target, verdicts
from bench.texts import Prompt, Writer
from headstart.model_files import embedded_model

TOY = "toy:eos=0"
PROMPT = Prompt("p", "text", tokens=100)


def reply(prompt: int = 120, evaluated: int = 20, **timings: object) -> Reply:
    usage = {"prompt_tokens": prompt, "completion_tokens": 4}
    return Reply("abcd", 0.0, (10.0, 12.0, 14.0, 16.0), 20.0, usage, {"prompt_n": evaluated, **timings})


def sample(who: str, number: int, value: float, arm: str = "b", measured: str = "ttft_ms") -> Sample:
    return Sample(arm, who, number, {measured: value})


@contextmanager
def streaming(*contents: str | None) -> Iterator[int]:
    """The port of a server that answers every request with these contents, one a chunk."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.end_headers()
            chunks = [{"choices": [{"delta": {"content": content}}]} for content in contents]
            account = {"choices": [], "usage": {"completion_tokens": 9}, "timings": {"prompt_n": 3}}
            for chunk in [*chunks, account]:
                self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever).start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()


def test_the_first_token_is_the_first_piece_of_text_that_is_not_empty() -> None:
    with streaming(None, "", "He", "", "llo") as port, closing(Connection(port)) as connection:
        answer = connection.ask("/v1/chat/completions", {})
    assert answer.text == "Hello"
    assert len(answer.arrivals_ms) == 2
    assert answer.ttft_ms == answer.arrivals_ms[0]
    assert answer.evaluated == 3


def test_an_answer_without_text_has_no_time_to_its_first_token() -> None:
    with streaming(None, "") as port, closing(Connection(port)) as connection:
        answer = connection.ask("/v1/chat/completions", {})
    with pytest.raises(BenchFailed, match="empty"):
        _ = answer.ttft_ms


def test_a_hit_evaluates_what_is_new_and_nothing_else() -> None:
    check_hit(reply(evaluated=20), PROMPT)
    check_hit(reply(evaluated=19), PROMPT)
    for evaluated in (120, 21, 1):
        with pytest.raises(BenchFailed, match="no hit"):
            check_hit(reply(evaluated=evaluated), PROMPT)


def test_a_hit_from_elsewhere_than_the_arm_measures_is_refused() -> None:
    check_hit(reply(cache_source="file"), PROMPT, "file")
    check_hit(reply(), PROMPT, "file")
    with pytest.raises(BenchFailed, match="'slot' instead of 'file'"):
        check_hit(reply(cache_source="slot"), PROMPT, "file")


def test_a_cold_request_evaluates_everything() -> None:
    check_cold(reply(evaluated=120))
    with pytest.raises(BenchFailed, match="119 were evaluated"):
        check_cold(reply(evaluated=119))


def test_servers_that_saw_different_prompts_are_not_compared(tmp_path: Path) -> None:
    with lab(tmp_path).same_prompts() as saw:
        saw(0, 1101)
        saw(1, 1099)
        with pytest.raises(BenchFailed, match="another one 1102"):
            saw(0, 1102)


def test_a_summary_has_the_middle_half() -> None:
    of = summary([5, 1, 2, 3, 4])
    assert (of.n, of.min, of.low, of.median, of.high, of.max) == (5, 1, 2, 3, 4, 5)
    assert summary([7]).low == summary([7]).high == 7


def test_ratios_are_taken_round_by_round() -> None:
    assert paired_ratios({0: 1, 1: 10, 2: 5}, {0: 2, 1: 20, 3: 9}) == [0.5, 0.5]


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(i) for i in range(1, 17)]
    assert percentile(values, 0.5) == 8
    assert percentile(values, 0.95) == 16
    assert percentile([3.0], 0.95) == 3


def test_a_step_is_timed_while_all_streams_run() -> None:
    usage = {"prompt_tokens": 1, "completion_tokens": 5}
    early = Reply("abcde", 0.0, (0, 10, 20, 30, 40), 40, usage, {})
    late = Reply("abcde", 0.02, (0, 10, 20, 30, 40), 40, usage, {})
    assert step_ms([early, late]) == pytest.approx(10)


def test_the_better_setting_of_the_peer_is_what_a_target_is_held_against() -> None:
    target = Target("figure", "b", "ttft_ms", ("llama-server", "llama-server best"), 1.05)
    samples = [
        sample("headstart", 0, 100),
        sample("llama-server", 0, 200),
        sample("llama-server best", 0, 80),
    ]
    verdict = target.verdict(samples)
    assert verdict
    assert verdict.measured == pytest.approx(1.25)
    assert not verdict.met
    more = replace(target, at_least=True, limit=0.5).verdict(samples)
    assert more
    assert (more.measured, more.met) == (0.5, True)


def test_what_was_not_measured_is_not_judged() -> None:
    assert verdicts([sample("headstart", 0, 100)]) == []
    assert len({(target.figure, target.arm) for target in TARGETS}) == len(TARGETS)
    assert {target.arm[0] for target in TARGETS} <= set(ARMS)


def test_the_report_says_what_was_met(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = [sample("headstart", i, 90 + i) for i in range(3)]
    samples += [sample("llama-server best", i, 100 + i) for i in range(3)]
    report.write(tmp_path, {"cpu": "any"}, samples, {"c": "no hit"})
    said = capsys.readouterr().out
    assert "Arm c failed: no hit" in said
    [line] = [line for line in said.splitlines() if "its best settings" in line]
    assert line.split()[-1] == "yes"
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept["samples"][0]["values"] == {"ttft_ms": 90}
    assert kept["failures"] == {"c": "no hit"}


def test_prompts_have_the_wanted_length_and_nothing_in_common() -> None:
    writer = Writer(TOY)
    one, other = writer.prompt(500), writer.prompt(500)
    assert one.text.split()[0] != other.text.split()[0]
    assert 490 <= one.tokens <= 500
    first, second = writer.question(60), writer.question(60)
    assert first.split()[0] != second.split()[0]
    tokens = writer.chat_tokens(one, first)
    assert len(tokens) - one.tokens <= 60
    assert tokens[: one.tokens] == writer.chat_tokens(one, second)[: one.tokens]
    assert Writer(TOY).prompt(500) == one


def test_arms_run_in_an_order_that_shares_servers() -> None:
    assert options(["--arms", "e,b,a"]).arms == ["a", "b", "e"]


def lab(directory: Path) -> Lab:
    host = Host(TOY, 1, directory, peer=Path("none"))
    return Lab(host, Writer(TOY), rounds=1, contenders=["headstart"])


@pytest.mark.slow
def test_headstart_is_measured_from_outside(tmp_path: Path) -> None:
    failures: dict[str, str] = {}
    with lab(tmp_path) as bench:
        for arm in ("a", "b", "c", "d", "k"):
            run_arm(bench, arm, failures)
        assert failures == {}
        arms = [sample.arm for sample in bench.samples]
        hit = next(sample for sample in bench.samples if sample.arm == "b")
    assert arms == ["a", "b", "c", "d", "d-cold", "k"]
    assert hit.values["ttft_ms"] > 0
    assert hit.values["prompt_n"] < 100


@pytest.mark.slow
def test_8_clients_are_measured_together(tmp_path: Path) -> None:
    failures: dict[str, str] = {}
    with lab(tmp_path) as bench:
        run_arm(bench, "e", failures)
        assert failures == {}
        [crowd] = bench.samples
    assert crowd.values["tokens_per_answer"] == 32
    assert crowd.values["hits"] == 1


@pytest.mark.slow
def test_a_hit_that_is_none_fails_its_arm_and_not_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Headstart, "hit", lambda self, prompt, question, slot=0: self.cold(prompt, question))
    failures: dict[str, str] = {}
    with lab(tmp_path) as bench:
        run_arm(bench, "b", failures)
        run_arm(bench, "a", failures)
        assert [sample.arm for sample in bench.samples] == ["a"]
    assert list(failures) == ["b"]
    assert "no hit" in failures["b"]


def test_the_random_model_can_only_generate_plain_words() -> None:
    rows = random_model.embeddings(["Ġword", "<|im_end|>", "Ã©", "Word", "3"], 64, np.random.default_rng(0))
    assert rows.shape == (5, 64 // 32 * 34)
    assert rows.any(axis=1).tolist() == [True, False, False, True, False]


@pytest.mark.real_model
def test_the_random_model_has_the_embedded_models_tokenizer(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    shape = random_model.Shape(layers=1, heads=2, kv_heads=1, head=32, hidden=32, ffn=32)
    path = random_model.written(tmp_path / "model.gguf", embedded_model(), shape)
    assert Writer(str(path)).prompt(200) == Writer(embedded_model()).prompt(200)


def test_the_peer_is_built_with_the_engines_flags() -> None:
    flags = "-DLLAVA_BUILD=OFF -DGGML_NATIVE=ON '-DCMAKE_C_FLAGS=-O3 -mno-amx-tile'"
    command = peer_build.configure_command(Path("cmake"), Path("source"), Path("build"), flags)
    assert shlex.split(flags)[1:] == command[-2:]
    assert "-DCMAKE_BUILD_TYPE=Release" in command
    assert not any("LLAVA" in argument for argument in command)


def test_the_peer_is_built_again_when_the_engine_would_be() -> None:
    assert peer_build.peer_key("one") == peer_build.peer_key("one")
    assert peer_build.peer_key("one") != peer_build.peer_key("other")
