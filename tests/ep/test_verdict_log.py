"""Laws of the verdict's line in the log and of its field in the status."""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import replace

import pytest

from sglang_moelb.ep import flags, verdict_log
from sglang_moelb.ep.verdict_log import VerdictLog, plain
from sglang_moelb.types import Decision, Effects, Lever, LeverScore, LoadEstimate, Policy, Verdict

TEXT = "turn on drop: expected gain 9.0 % [8.0, 10.0] of prefill time, costs 1.0 % of gate mass"
VERDICT = Verdict(
    lever=Lever.DROP,
    text=TEXT,
    reason=TEXT.partition("turn on ")[2],
    num_passes=400,
    num_passes_needed=60,
    num_small_passes=7,
    scores=(
        LeverScore(
            lever=Lever.DROP,
            gain=0.09,
            gain_low=0.08,
            gain_high=0.1,
            lost_mass_share=0.01,
            low_share=0.0,
            measured=False,
        ),
    ),
    log_interval_s=60.0,
)


def effects(verdict: Verdict | None) -> Effects:
    nothing: LoadEstimate = None  # type: ignore[assignment]
    decision = Decision(
        lever=Lever.NONE, reason="", expected_gain=0.0, expected_lost_mass_share=0.0
    )
    return Effects(policy=Policy(epoch=0), decision=decision, estimate=nothing, verdict=verdict)


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(verdict_log, "time", made)
    return made


def test_one_line_is_logged_in_each_interval(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="sglang_moelb")
    log = VerdictLog()
    for _ in range(399):
        clock.now_s += 0.5
        log.add(effects(VERDICT))
    assert caplog.messages == [f"sglang_moelb: verdict: {TEXT} (400 passes)"] * 3
    log.add(effects(replace(VERDICT, log_interval_s=19.0)))
    assert len(caplog.messages) == 4, "a shorter interval holds at once"


def test_without_a_verdict_nothing_is_logged_and_the_status_is_null(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="sglang_moelb")
    log = VerdictLog()
    clock.now_s += 1000.0
    log.add(effects(None))
    assert caplog.messages == []
    assert plain(effects(None)) is None
    assert plain(None) is None


def test_the_status_has_every_score_as_plain_json() -> None:
    told = json.loads(json.dumps(plain(effects(VERDICT))))
    assert told == {
        "lever": "drop",
        "text": TEXT,
        "reason": VERDICT.reason,
        "num_passes": 400,
        "num_passes_needed": 60,
        "num_small_passes": 7,
        "scores": {
            "drop": {
                "gain": 0.09,
                "gain_low": 0.08,
                "gain_high": 0.1,
                "lost_mass_share": 0.01,
                "low_share": 0.0,
                "own_time_measured": False,
            }
        },
    }


def test_the_flag_turns_it_on_over_a_configuration_that_does_not() -> None:
    parser = argparse.ArgumentParser()
    flags.add_arguments(parser)
    off = '{"verdict": {"enabled": false, "log_interval_s": 5}}'
    config = flags.config_of(parser.parse_args(["--moelb-config", off, "--moelb-verdict"]))
    assert config is not None
    assert (config.verdict.enabled, config.verdict.log_interval_s) == (True, 5.0)
    without = flags.config_of(parser.parse_args(["--moelb-mode", "observe"]))
    assert without is not None
    assert not without.verdict.enabled
