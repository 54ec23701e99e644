"""Run the plan: arm by arm in its order, each server started once for sessions that follow."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Protocol

from sglang_moelb.ab.arms import server_command
from sglang_moelb.ab.drive import drive
from sglang_moelb.ab.server import ServerError, pick_port, serve
from sglang_moelb.ab.types import Arm, ArmRun, Plan, Session


class Progress(Protocol):
    """Where the run tells how far it is."""

    def starting(self, arm: str, waited_s: float) -> None:
        """The arm's server is not ready yet, after `waited_s` seconds."""

    def running(self, arm: str) -> None:
        """The arm's server is ready; requests follow."""

    def advance(self, arm: str) -> None:
        """One request of the arm is done."""

    def ended(self, arm: str, failure: str) -> None:
        """The arm's session is over; `failure` is "" or why it broke off."""


def run_plan(plan: Plan, progress: Progress) -> list[ArmRun]:
    """Drive every arm of `plan`; one `ArmRun` per arm, in the order of `plan.arms`.

    An arm whose server dies is marked with the reason and its outcomes are kept; the others still
    run. Raises `ServerError` if the very first server does not come up: there is nothing to
    compare with then.
    """
    by_name = {arm.name: arm for arm in plan.arms}
    runs = {arm.name: ArmRun(arm=arm, command=()) for arm in plan.arms}
    for name, group in groupby(plan.order):
        if runs[name].failure:
            continue
        num_sessions = len(list(group))
        try:
            runs[name] = _run_arm(plan, by_name[name], runs[name], num_sessions, progress)
        except ServerError as error:
            if not any(run.sessions for run in runs.values()):
                raise ServerError(f"arm {name}: {error}") from error
            runs[name] = replace(runs[name], failure=str(error))
            progress.ended(name, str(error))
    return list(runs.values())


def _run_arm(plan: Plan, arm: Arm, run: ArmRun, num_sessions: int, progress: Progress) -> ArmRun:
    if arm.url is not None:
        progress.running(arm.name)
        return _drive(plan, run, num_sessions, arm.url, 0.0, progress, lambda: "")
    port = pick_port(plan.port)
    command = server_command(plan, arm, port)
    start_s = time.monotonic()
    with serve(
        command,
        port=port,
        log=log_path(plan.out, arm),
        timeout_s=plan.ready_timeout_s,
        on_wait=lambda waited_s: progress.starting(arm.name, waited_s),
    ) as server:
        ready_s = time.monotonic() - start_s
        progress.running(arm.name)
        run = replace(run, command=tuple(command))
        return _drive(plan, run, num_sessions, server.url, ready_s, progress, server.death)


def log_path(out: Path, arm: Arm) -> Path:
    """Where the output of the arm's server goes."""
    return out / arm.name / "server.log"


def _drive(
    plan: Plan,
    run: ArmRun,
    num_sessions: int,
    url: str,
    start_s: float,
    progress: Progress,
    death: Callable[[], str],
) -> ArmRun:
    sessions: list[Session] = list(run.sessions)
    failure = ""
    for _ in range(num_sessions):
        session = drive(
            plan,
            url,
            first_round=len(sessions) * plan.rounds,
            start_s=start_s,
            on_done=lambda: progress.advance(run.arm.name),
            death=death,
        )
        sessions.append(session)
        progress.ended(run.arm.name, session.failure)
        if session.failure:
            failure = session.failure
            break
    return replace(run, sessions=tuple(sessions), failure=failure)
