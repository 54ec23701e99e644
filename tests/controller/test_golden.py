"""The same records give the same policies: within a run, and across versions of the code.

The golden file holds the rows of a small drifting load and the policies that mode auto made of it.
After a wanted change of the rules, print the new one with `python -m controller.test_golden` in
`tests/` and review the difference.

Shape letters: E logical experts.
"""

from __future__ import annotations

import json
from pathlib import Path

from sglang_moelb.controller.controller import Controller
from sglang_moelb.types import Effects, Observation

from .world import TOPOLOGY, config, observe, record, serve

GOLDEN = Path(__file__).parent.parent / "golden" / "controller_auto.json"
SETTINGS = {"quality_budget": 0.05, "quality_window_passes": 16, "window_passes": 8}


def told(effects: list[Effects]) -> list[list[object]]:
    """What a pass's effects say to the ranks and to people."""
    return [[e.policy.epoch, e.policy.lever.name, e.policy.reason] for e in effects]


def golden_text(passes: list[list[int]]) -> str:
    """The golden file of `passes`, one line a pass."""
    effects = serve(Controller(config(**SETTINGS), TOPOLOGY), passes)
    lines = [
        json.dumps([rows_E, *tell]) for rows_E, tell in zip(passes, told(effects), strict=True)
    ]
    return "[\n" + ",\n".join(lines) + "\n]\n"


def golden_passes() -> list[list[int]]:
    """Rows per expert of each recorded pass."""
    return [line[0] for line in json.loads(GOLDEN.read_text(encoding="utf-8"))]


def test_the_recorded_load_gives_the_recorded_policies() -> None:
    assert golden_text(golden_passes()) == GOLDEN.read_text(encoding="utf-8")


def test_the_golden_load_tries_every_lever() -> None:
    levers = {line[2] for line in json.loads(GOLDEN.read_text(encoding="utf-8"))}
    assert levers == {"NONE", "EXPAND", "DROP"}


def test_replaying_the_records_of_a_run_gives_its_policies() -> None:
    live = Controller(config(**SETTINGS), TOPOLOGY)
    records, effects = [], []
    for step, rows_E in enumerate(golden_passes()):
        records.append(record(rows_E, policy=live.policy, step=step))
        effects.append(live.step(Observation(record=records[-1], now_s=0.1 * step)))
    replayed = observe(Controller(config(**SETTINGS), TOPOLOGY), records)
    assert [e.policy for e in replayed] == [e.policy for e in effects]


if __name__ == "__main__":
    print(golden_text(golden_passes()), end="")
