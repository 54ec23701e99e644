"""From the runs of all arms to the `Result` that tables, plots and JSON show."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_moelb.ab.agreement import agreement, repeatability
from sglang_moelb.ab.measure import differences, failures, served
from sglang_moelb.ab.passes import measure_passes
from sglang_moelb.ab.quality import accuracy, compare_accuracy, grade
from sglang_moelb.ab.result import SCHEMA, ArmResult, Conditions, Result
from sglang_moelb.ab.types import ArmRun, Request


def compare_runs(
    runs: Sequence[ArmRun], requests: Sequence[Request], conditions: Conditions
) -> Result:
    """Every measure of every arm over `requests`, and the differences to the first."""
    first = runs[0]
    arms = [_arm(first, run, requests) for run in runs]
    return Result(
        schema=SCHEMA,
        conditions=conditions,
        arms=arms,
        differences=[
            difference
            for arm in arms[1:]
            for difference in differences(arms[0].served, arm.served, arm.name)
        ],
        repeat=repeatability(first.outcomes),
    )


def _arm(first: ArmRun, run: ArmRun, requests: Sequence[Request]) -> ArmResult:
    graded = grade(requests, run.outcomes)
    is_other = run.arm.name != first.arm.name
    return ArmResult(
        name=run.arm.name,
        flags=list(run.arm.flags),
        url=run.arm.url,
        command=list(run.command),
        failure=run.failure,
        start_s=run.sessions[0].start_s if run.sessions and run.arm.url is None else None,
        wall_s=[r.wall_s for session in run.sessions for r in session.rounds],
        served=served(run),
        failures=failures(run.outcomes),
        agreement=agreement(first.outcomes, run.outcomes),
        accuracy=accuracy(graded),
        paired_accuracy=(
            compare_accuracy(grade(requests, first.outcomes), graded) if is_other else []
        ),
        passes=measure_passes(run),
        status_error="; ".join(s.status_error for s in run.sessions if s.status_error),
    )
