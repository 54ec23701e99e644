from __future__ import annotations

from typing import Any

import pytest

from sglang_moelb.ab.agreement import agreement, compare, repeatability
from sglang_moelb.ab.measure import differences, failures, served, spread
from sglang_moelb.ab.types import Arm, ArmRun, Outcome, RoundTime, Session


def outcome(request_id: int = 0, round_: int = 0, **changes: Any) -> Outcome:
    values: dict[str, Any] = {
        "request_id": request_id,
        "kind": "text",
        "round": round_,
        "start_s": 0.0,
        "ttft_ms": 10.0,
        "latency_ms": 40.0,
        "num_prompt_tokens": 5,
        "num_output_tokens": 4,
        "token_ids": (1, 2, 3, 4),
        "token_texts": ("a", "b", "c", "d"),
        "logprobs": (-1.0, -2.0, -3.0, -4.0),
    }
    return Outcome(**(values | changes))


def run_of(outcomes: list[Outcome], walls_s: list[float]) -> ArmRun:
    rounds = tuple(RoundTime(round=i, wall_s=wall_s) for i, wall_s in enumerate(walls_s))
    session = Session(outcomes=tuple(outcomes), rounds=rounds, observed=None, start_s=1.0)
    return ArmRun(arm=Arm(name="x"), command=(), sessions=(session,))


def test_throughput_is_tokens_over_the_wall_time_of_each_round() -> None:
    run = run_of([outcome(0, 0), outcome(1, 0), outcome(0, 1), outcome(1, 1)], [2.0, 4.0])
    (everything, text) = served(run)
    assert everything.output_tok_s is not None
    assert everything.output_tok_s.rounds == [4.0, 2.0]
    assert everything.output_tok_s.value == 3.0
    assert everything.prompt_tok_s is not None
    assert everything.prompt_tok_s.rounds == [5.0, 2.5]
    assert everything.requests_s is not None
    assert everything.requests_s.rounds == [1.0, 0.5]
    assert text.num_requests == 4


def test_percentiles_are_within_a_round_and_linear() -> None:
    run = run_of([outcome(i, 0, latency_ms=float(i)) for i in range(101)], [1.0])
    latency = served(run)[0].latency_ms
    assert latency is not None
    assert (latency.p50.value, latency.p95.value, latency.p99.value) == (50.0, 95.0, 99.0)


def test_time_per_output_token_leaves_out_the_first_token_and_one_token_answers() -> None:
    run = run_of([outcome(0), outcome(1, num_output_tokens=1)], [1.0])
    tpot = served(run)[0].tpot_ms
    assert tpot is not None
    assert tpot.p50.value == 10.0  # (40 - 10) / (4 - 1)


def test_failed_requests_count_and_do_not_enter_the_rates() -> None:
    run = run_of([outcome(0), outcome(1, error="refused"), outcome(2, error="refused")], [1.0])
    row = served(run)[0]
    assert (row.num_requests, row.num_failed, row.num_output_tokens) == (3, 2, 4)
    assert failures(run.outcomes) == {"refused": 2}


def test_kinds_are_apart() -> None:
    run = run_of([outcome(0), outcome(1, kind="image", latency_ms=80.0)], [1.0])
    rows = {row.kind: row for row in served(run)}
    assert rows["image"].latency_ms is not None
    assert rows["image"].latency_ms.p50.value == 80.0
    assert rows["text"].num_requests == 1


def test_a_spread_has_the_median_and_the_ends() -> None:
    values = spread([3.0, 1.0, 2.0])
    assert values is not None
    assert (values.value, values.low, values.high) == (2.0, 1.0, 3.0)
    assert spread([]) is None


def test_a_difference_says_whether_the_rounds_overlap() -> None:
    slow = served(run_of([outcome(0, 0), outcome(0, 1)], [1.0, 1.1]))
    fast = served(run_of([outcome(0, 0), outcome(0, 1)], [0.5, 0.55]))
    found = {row.measure: row for row in differences(slow, fast, "fast")}
    assert found["all output_tok_s"].change == pytest.approx(1.0)
    assert not found["all output_tok_s"].within_spread
    assert found["all latency_ms p50"].change == 0.0
    assert found["all latency_ms p50"].within_spread


def test_tokens_agree_up_to_the_first_difference() -> None:
    pair = compare(
        outcome(token_ids=(5, 6, 7), logprobs=(-1.0, -2.0, -3.0)),
        outcome(token_ids=(5, 6, 8), logprobs=(-1.0, -2.5, -1.0)),
    )
    assert (pair.num_common, pair.num_longest, pair.is_equal) == (2, 3, False)
    assert pair.differences == (0.0, 0.5)


def test_a_shorter_answer_is_not_equal() -> None:
    pair = compare(outcome(token_ids=(5, 6, 7)), outcome(token_ids=(5, 6)))
    assert (pair.num_common, pair.num_longest, pair.is_equal) == (2, 3, False)


def test_texts_are_compared_where_a_server_sends_no_ids() -> None:
    pair = compare(outcome(), outcome(token_ids=(), token_texts=("a", "b", "x", "d")))
    assert (pair.num_common, pair.num_longest) == (2, 4)


def test_an_arm_agrees_with_itself_entirely() -> None:
    outcomes = [outcome(i, r, kind=k) for i, k in ((0, "text"), (1, "image")) for r in (0, 1)]
    for row in agreement(outcomes, outcomes):
        assert (row.equal_share, row.token_share, row.logprob_coverage) == (1.0, 1.0, 1.0)
        for distance in (row.distance_all, row.distance_equal):
            assert distance is not None
            assert (distance.mean, distance.max) == (0.0, 0.0)


def test_agreement_of_a_hand_made_case() -> None:
    base = [outcome(0), outcome(1), outcome(2), outcome(3)]
    other = [
        outcome(0, logprobs=(-1.0, -2.0, -3.0, -4.4)),
        outcome(1, token_ids=(1, 9, 3, 4)),
        outcome(2, error="gone"),
        outcome(3, logprobs=(None, -2.0, -3.0, -4.0)),
    ]
    row = agreement(base, other)[0]
    assert (row.num_pairs, row.num_equal) == (3, 2)
    assert row.token_share == (4 + 1 + 4) / 12
    assert row.logprob_coverage == 8 / 9
    assert row.distance_all is not None
    assert row.distance_all.num_tokens == 8
    assert row.distance_all.max == pytest.approx(0.4)
    assert row.distance_equal is not None
    assert row.distance_equal.mean == pytest.approx(0.4 / 7)


def test_rounds_are_paired_with_the_same_round() -> None:
    base = [outcome(0, 0), outcome(0, 1, token_ids=(1, 2, 3, 5))]
    other = [outcome(0, 1, token_ids=(1, 2, 3, 5))]
    assert agreement(base, other)[0].num_pairs == 1
    assert agreement(base, other)[0].equal_share == 1.0


def test_repeatability_compares_later_rounds_with_the_first() -> None:
    outcomes = [outcome(0, 0), outcome(0, 1), outcome(0, 2, token_ids=(1, 2, 3, 5))]
    row = repeatability(outcomes)[0]
    assert (row.num_pairs, row.num_equal) == (2, 1)
    assert repeatability(outcomes[:1]) == []
