"""What measuring chooses follows from what things cost."""

from __future__ import annotations

from typing import Any

import pytest

from headstart.engine.model import ModelError
from headstart.engine.trials import TrialShape
from headstart.engine.tuning import measure as module
from headstart.engine.tuning.bench import in_turn
from headstart.engine.tuning.costs import Sample, fit
from headstart.engine.tuning.measure import MARGIN, break_even, measure, thread_counts
from headstart.engine.tuning.resolve import resolved
from headstart.numerics import DEFAULT, Numerics
from headstart.protocol import EngineSettings
from trials import Cost, FakeTrials

PASS_MS, TOKEN_MS, ATTEND_MS = 6.0, 4.0, 0.002
MODEL = EngineSettings("m", 0, 0)
ATTENTION = Numerics(flash_attention=True, weights="file")
CONVERTED = Numerics(flash_attention=False, weights="q8_0")
BOTH = Numerics(flash_attention=True, weights="q8_0")


def asking(**numerics: Any) -> EngineSettings:
    return EngineSettings("m", 0, 0, numerics=Numerics(**numerics))


def linear(shape: TrialShape, threads: int, n: int, depth: int) -> float:
    """The cost model itself, whatever the layout and the kind of attention."""
    return PASS_MS + n * (TOKEN_MS + depth * ATTEND_MS)


def attention_slower(shape: TrialShape, threads: int, n: int, depth: int) -> float:
    return linear(shape, threads, n, depth) * (1.5 if shape.numerics.flash_attention else 1)


def attention_faster(shape: TrialShape, threads: int, n: int, depth: int) -> float:
    return linear(shape, threads, n, depth) * (0.8 if shape.numerics.flash_attention else 1)


def sharing_pays_from(length: int) -> Cost:
    """With 4 sequences, sharing costs more to begin with and less by the depth."""

    def cost(shape: TrialShape, threads: int, n: int, depth: int) -> float:
        if shape.sequences != 4:
            return linear(shape, threads, n, depth)
        before = depth - 1
        if shape.streams:
            return 10 + 0.02 * before
        return MARGIN * (10 + 0.02 * length) + 0.001 * (before - length)

    return cost


def test_flash_attention_is_off_where_it_costs_more_and_on_where_it_saves() -> None:
    assert measure(MODEL, FakeTrials(attention_slower)).numerics == DEFAULT
    assert measure(MODEL, FakeTrials(attention_faster)).numerics == ATTENTION


def test_flash_attention_needs_more_than_a_draw() -> None:
    assert measure(MODEL, FakeTrials(linear)).numerics == DEFAULT


def test_a_given_flash_attention_wins_and_the_preferred_one_is_told() -> None:
    tuning = measure(asking(flash_attention=True), FakeTrials(attention_slower))
    assert tuning.numerics == ATTENTION
    assert tuning.ranking == [DEFAULT, ATTENTION]
    assert tuning.token_ms == pytest.approx(1.5 * TOKEN_MS)


def test_decoding_weighs_more_than_the_new_tokens() -> None:
    def slow_decode(shape: TrialShape, threads: int, n: int, depth: int) -> float:
        if not shape.numerics.flash_attention:
            return linear(shape, threads, n, depth)
        return 40 if n == 1 else 0.5 * linear(shape, threads, n, depth)

    assert measure(MODEL, FakeTrials(slow_decode)).numerics == DEFAULT


def test_a_model_that_can_not_do_flash_attention_is_measured_without() -> None:
    without = FakeTrials(attention_faster, refused=lambda shape: bool(shape.numerics.flash_attention))
    assert measure(MODEL, without).numerics == DEFAULT
    with pytest.raises(ModelError):
        measure(asking(flash_attention=True), without)
    assert without.closed
    only = FakeTrials(attention_slower, refused=lambda shape: not shape.numerics.flash_attention)
    assert measure(MODEL, only).numerics == ATTENTION


def costs_by(factors: dict[Numerics, float], **more: Any) -> FakeTrials:
    """Trials of a model with converted weights where each numerics takes so many times as long."""

    def cost(shape: TrialShape, threads: int, n: int, depth: int) -> float:
        return linear(shape, threads, n, depth) * factors.get(shape.numerics, 1)

    return FakeTrials(cost, weights=("file", "q8_0"), **more)


@pytest.mark.parametrize("best", [DEFAULT, ATTENTION, CONVERTED, BOTH])
def test_of_weights_and_flash_attention_the_pair_is_taken_that_a_hit_is_fastest_with(
    best: Numerics,
) -> None:
    tuning = measure(MODEL, costs_by({best: 0.8}))
    assert tuning.numerics == tuning.ranking[0] == best
    assert len(tuning.ranking) == 4
    assert tuning.token_ms == pytest.approx(0.8 * TOKEN_MS)


def test_converted_weights_need_more_than_a_draw() -> None:
    assert measure(MODEL, costs_by({CONVERTED: MARGIN + 0.01})).numerics == DEFAULT
    assert measure(MODEL, costs_by({CONVERTED: MARGIN - 0.01})).numerics == CONVERTED


def test_what_is_left_open_is_the_best_of_what_is_given() -> None:
    factors = {ATTENTION: 0.9, CONVERTED: 0.7, BOTH: 0.8}
    tuning = measure(asking(flash_attention=True), costs_by(factors))
    assert tuning.numerics == BOTH
    assert tuning.ranking == [CONVERTED, BOTH, ATTENTION, DEFAULT]
    assert measure(asking(weights="file"), costs_by(factors)).numerics == ATTENTION


def test_converted_weights_that_prefill_slowly_are_not_taken_for_fast_decoding() -> None:
    def cost(shape: TrialShape, threads: int, n: int, depth: int) -> float:
        converted = shape.numerics.weights == "q8_0"
        return linear(shape, threads, n, depth) * ((0.8 if n == 1 else 1.5) if converted else 1)

    assert measure(MODEL, FakeTrials(cost, weights=("file", "q8_0"))).numerics == DEFAULT


def test_what_one_pair_has_prefilled_is_copied_to_the_one_with_other_weights() -> None:
    alone, both = FakeTrials(linear), costs_by({})
    measure(MODEL, alone)
    measure(MODEL, both)
    assert both.restored == alone.restored + 2
    assert both.spent < alone.spent + 3000


def test_other_work_on_the_machine_does_not_change_a_time() -> None:
    times = iter([9.0, 4.0, 7.0, 5.0, 4.5, 90.0])
    assert in_turn({"one": lambda: next(times)}, 25) == {"one": 4.0}


def test_the_cost_model_is_recovered_from_exact_costs() -> None:
    tuning = measure(MODEL, FakeTrials(linear))
    assert tuning.pass_ms == pytest.approx(PASS_MS)
    assert tuning.token_ms == pytest.approx(TOKEN_MS)
    assert tuning.attend_ms == pytest.approx(ATTEND_MS)


def test_no_cost_is_negative() -> None:
    costs = fit([Sample(1, 1, 5.0), Sample(16, 16, 80.0), Sample(16, 500, 70.0), Sample(64, 64, 325.0)])
    assert min(costs) == costs.attend_ms == 0
    assert costs.token_ms == pytest.approx(5, rel=0.1)


@pytest.mark.parametrize(("pass_ms", "expected"), [(0.0, 16), (12.0, 64), (1000.0, 256)])
def test_the_ubatch_is_the_smallest_that_is_nearly_the_fastest(pass_ms: float, expected: int) -> None:
    def cost(shape: TrialShape, threads: int, n: int, depth: int) -> float:
        return pass_ms + 3 * n if pass_ms < 1000 else 40 + 0.5 * n

    assert measure(MODEL, FakeTrials(cost)).ubatch == expected


def test_threads_are_those_a_hit_costs_least_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available_cpus", lambda: 8)
    monkeypatch.setattr(module, "physical_cores", lambda: 4)

    def best_with(best: int) -> FakeTrials:
        def cost(shape: TrialShape, threads: int, n: int, depth: int) -> float:
            return linear(shape, threads, n, depth) * (1 if threads == best else 2)

        return FakeTrials(cost)

    assert measure(MODEL, best_with(4)).threads == 4
    assert measure(MODEL, best_with(8)).threads == 8
    assert measure(MODEL, FakeTrials(linear)).threads == 8
    assert measure(EngineSettings("m", 0, 0, threads=3), best_with(4)).threads == 3


def test_all_cpus_half_of_them_and_the_cores_are_tried() -> None:
    assert thread_counts(2, 2) == [2]
    assert thread_counts(2, 1) == [2, 1]
    assert thread_counts(8, None) == [8, 4]
    assert thread_counts(12, 8) == [12, 6, 8]


def test_sharing_that_never_pays_is_never_done() -> None:
    assert measure(MODEL, FakeTrials(linear)).share_from == 0


@pytest.mark.parametrize(("length", "expected"), [(0, 64), (100, 128), (250, 256), (2000, 2048)])
def test_sharing_begins_where_it_pays(length: int, expected: int) -> None:
    assert measure(MODEL, FakeTrials(sharing_pays_from(length))).share_from == expected


def test_what_would_pay_far_beyond_the_measured_depth_is_not_believed() -> None:
    times = {(0, False): 10.0, (0, True): 12.0, (64, False): 10.6, (64, True): 12.2}
    assert break_even(64, times) == 448
    assert break_even(64, times | {(0, True): 19.5, (64, True): 19.8}) == 0


def test_a_model_that_can_not_share_is_not_tried_for_it() -> None:
    trials = FakeTrials(linear, can_share=False, can_cut=False)
    assert measure(MODEL, trials).share_from == 0
    assert {trial.shape.sequences for trial in trials.made} == {2}


def test_everything_is_closed_at_the_end() -> None:
    trials = FakeTrials(linear)
    measure(MODEL, trials)
    assert trials.closed
    assert all(trial.closed for trial in trials.made)


@pytest.mark.parametrize("slowness", [0.1, 1, 10, 100])
def test_a_slow_model_is_measured_over_less_and_not_much_longer(slowness: float) -> None:
    trials = FakeTrials(lambda *call: slowness * linear(*call))
    tuning = measure(MODEL, trials)
    assert trials.spent < 17_000 + 160_000 * (slowness / 100)
    assert tuning.pass_ms == pytest.approx(slowness * PASS_MS)
    assert tuning.ubatch in (16, 32, 64, 128, 256)


def test_what_is_set_wins_over_what_was_measured_and_that_over_defaults() -> None:
    tuning = measure(MODEL, FakeTrials(attention_faster))
    measured = resolved(EngineSettings("m", 0, 0), tuning)
    assert (measured.numerics, measured.prefill_chunk, measured.threads, measured.share_from) == (
        ATTENTION,
        tuning.ubatch,
        tuning.threads,
        tuning.share_from,
    )
    forced = EngineSettings("m", 0, 0, threads=7, prefill_chunk=48, numerics=DEFAULT, share_from=99)
    forced_too = resolved(forced, tuning)
    assert (forced_too.threads, forced_too.prefill_chunk) == (7, 48)
    assert (forced_too.numerics, forced_too.share_from) == (DEFAULT, 99)
    default = resolved(EngineSettings("m", 0, 0), None)
    assert (default.numerics, default.prefill_chunk, default.share_from) == (DEFAULT, 64, 256)
    assert default.threads > 0
