"""Laws of the compact answer: what it keeps of a status, and how large it may become."""

from __future__ import annotations

import gzip
from typing import Any

import msgspec
import numpy as np
import pytest

from sglang_moelb.ep.status import NUM_RECENT, Ledger
from sglang_moelb.live.answer import NUM_STRETCHES, live_of
from sglang_moelb.live.wire import VERSION, Live, decode, encode
from sglang_moelb.types import Lever, Policy, Topology

from .statuses import EXPERTS_PER_RANK, REASONS, Recent, one_pass, status

KB = 1024


def test_the_answer_says_what_the_status_says() -> None:
    full = status(num_ranks=4, num_layers=6)
    live = live_of(full)
    shown = next(row for row in full["recent"] if row["step"] == full["heat"]["step"])
    assert live.last is not None
    assert live.last.rows_before_R == shown["rows_before_R"]
    assert live.last.balance_after_L == pytest.approx(shown["balance_after_L"], abs=0.005)
    assert live.heat is not None
    assert (live.heat.step, live.heat.before) == (shown["step"], full["heat"]["before"])
    assert (live.mode, live.lever, live.controller) == ("auto", "expand", "running")
    assert live.policy_reason == REASONS[Lever.EXPAND]
    assert live.spent_share == 0.012
    assert live.quality_budget == full["config"]["controller"]["quality_budget"]
    assert live.num_passes_by_lever == full["totals"]["num_passes_by_lever"]
    assert live.memory == full["memory"]
    assert live.verdict == full["verdict"]["text"]
    assert live.history is not None
    assert live.history.step[-1] == full["recent"][-1]["step"]


def test_it_comes_back_from_the_wire_unchanged() -> None:
    live = live_of(status(num_ranks=4, num_layers=6))
    assert decode(encode(live)) == live


@pytest.mark.parametrize(
    ("num_ranks", "num_layers", "plain_kb", "packed_kb"),
    [(2, 4, 6, 2), (64, 96, 20, 9), (256, 96, 26, 13)],
)
def test_it_stays_small(num_ranks: int, num_layers: int, plain_kb: int, packed_kb: int) -> None:
    """With 64 recent passes, levers, a memory ledger and a verdict; loads without any pattern."""
    full = status(num_ranks=num_ranks, num_layers=num_layers, skew=0.8)
    body = encode(live_of(full))
    assert len(body) < plain_kb * KB
    assert len(gzip.compress(body, 6)) < packed_kb * KB
    assert len(msgspec.json.encode(full)) > 4 * len(body)


@pytest.mark.parametrize(
    "bare",
    [
        {},
        {"active": False, "reason": "no rank answers"},
        {"active": True},
        {"active": True, "heat": None, "recent": [], "memory": None, "verdict": None},
    ],
)
def test_fields_that_are_missing_are_no_error(bare: dict[str, Any]) -> None:
    live = live_of(bare)
    assert live.active is bool(bare.get("active"))
    assert live.reason == bare.get("reason", "")
    assert live.last is None
    assert decode(encode(live)) == live


def test_before_the_first_pass_there_is_nothing_to_show() -> None:
    live = live_of(status(num_passes=0))
    assert live.last is None
    assert live.heat is None
    assert live.spent_share is None
    assert live.history is None


def test_a_number_that_is_none_does_not_break_the_answer() -> None:
    full = status(spent_share=float("nan"))
    full["recent"][-1]["lost_share"] = float("inf")
    live = live_of(full)
    assert live.spent_share is None
    assert decode(encode(live)) == live


def test_decisions_are_the_changes_of_the_lever_with_the_last_reason() -> None:
    live = live_of(status(num_passes=64))
    assert [one.lever for one in live.decisions] == [
        "none", "drop", "expand", "drop", "none", "drop",
    ]  # fmt: skip
    assert sum(one.num_passes for one in live.decisions) == 64
    assert sum(one.num_gated for one in live.decisions) > 0
    assert live.decisions[-1].reason == REASONS[Lever.DROP]
    assert len(live.decisions) <= NUM_STRETCHES


def test_a_small_pass_does_not_push_a_large_one_aside() -> None:
    ledger, recent = Ledger(_SIZES), Recent(_SIZES)

    def shown_after(step: int, num_tokens: int) -> int:
        policy = Policy(epoch=0, min_batch_tokens=2048)
        record, effects = one_pass(_SIZES, policy, step, num_tokens=num_tokens)
        ledger.add(record, effects)
        recent.add(record, ledger)
        heat = recent.shown.heat()
        assert heat is not None
        assert any(row["step"] == heat["step"] for row in recent.rows)
        return int(heat["step"])

    assert shown_after(1, num_tokens=4096) == 1
    for step in range(2, NUM_RECENT + 1):
        assert shown_after(step, num_tokens=8) == 1
    assert shown_after(99, num_tokens=8) == 99, "the large one is no longer among the recent ones"
    assert shown_after(100, num_tokens=9) == 100, "among small ones the newest is shown"
    assert shown_after(101, num_tokens=4096) == 101
    assert shown_after(102, num_tokens=2048) == 102, "the newest large one"


_SIZES = Topology(num_layers=3, num_experts=2 * EXPERTS_PER_RANK, num_ranks=2, topk=8)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not a JSON object"),
        (b"<!doctype html>", "not a JSON object"),
        (b"[1]", "not a JSON object"),
        (b"{}", "not a live view"),
        (b'{"moelb_live": "x"}', "not a live view"),
        (b'{"moelb_live": 99}', "version 99 .* upgrade"),
        (b'{"moelb_live": 1, "num_ranks": "two"}', "cannot be read"),
        (encode(Live(moelb_live=VERSION, mode="auto"))[:-3], "not a JSON object"),
    ],
)
def test_what_is_not_an_answer_is_named(body: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(body)


def test_fields_of_a_later_writer_are_ignored() -> None:
    assert decode(b'{"moelb_live": 1, "mode": "auto", "unheard": [1]}').mode == "auto"


def test_texts_are_bounded() -> None:
    full = status()
    full["policy"]["reason"] = "x" * 10_000
    assert len(live_of(full).policy_reason) <= 400


def test_levels_and_rows_agree() -> None:
    full = status(num_ranks=8, num_layers=5)
    live = live_of(full)
    assert live.heat is not None
    assert live.last is not None
    assert len(live.heat.before) == 8 * 5
    hottest = np.array([int(c, 16) for c in live.heat.before]).reshape(8, 5).max(axis=0)
    for level, balance in zip(hottest.tolist(), live.last.balance_before_L, strict=True):
        assert live.heat.edges[level - 1] <= balance + 0.006
