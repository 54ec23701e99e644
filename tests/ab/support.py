"""What the tests of the comparison share: plans whose servers are fakes, and a silent progress."""

from __future__ import annotations

import sys
from pathlib import Path

from sglang_moelb.ab.arms import parse_arms, session_order
from sglang_moelb.ab.types import Arm, Plan
from sglang_moelb.ab.workload import demo_workload

MAX_TOKENS = 8
FAKE_SERVER = Path(__file__).with_name("fake_server.py")


class SilentProgress:
    """A progress that counts and says nothing."""

    def __init__(self) -> None:
        self.num_done: dict[str, int] = {}
        self.failures: dict[str, str] = {}

    def starting(self, arm: str, waited_s: float) -> None:
        """Nothing to count."""

    def running(self, arm: str) -> None:
        """The arm counts from zero."""
        self.num_done.setdefault(arm, 0)

    def advance(self, arm: str) -> None:
        """One more."""
        self.num_done[arm] += 1

    def ended(self, arm: str, failure: str) -> None:
        """Keep the last failure."""
        self.failures[arm] = failure


def fake_command(plan: Plan, arm: Arm, port: int) -> list[str]:
    """In place of `arms.server_command`: the same flags to the fake server."""
    return [sys.executable, str(FAKE_SERVER), "--port", str(port), *plan.common_flags, *arm.flags]


def make_plan(
    out: Path,
    *arms: str,
    urls: tuple[str, ...] = (),
    order: str = "AB",
    num_requests: int = 10,
    rounds: int = 2,
    common_flags: tuple[str, ...] = ("--tool-call-parser", "x"),
) -> Plan:
    """A small plan over the demo workload."""
    parsed = parse_arms(arms, urls)
    return Plan(
        arms=parsed,
        order=session_order(parsed, order),
        requests=demo_workload(num_requests, seed=3, image_side_px=64),
        workload="demo",
        model="fake",
        common_flags=common_flags,
        rounds=rounds,
        concurrency=4,
        max_tokens=MAX_TOKENS,
        num_warmup=3,
        seed=3,
        out=out,
        cpu=True,
        num_ranks=2,
        ready_timeout_s=60.0,
        request_timeout_s=30.0,
    )
