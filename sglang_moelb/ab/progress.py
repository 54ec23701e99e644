"""One progress bar per arm on the terminal."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sglang_moelb.ab.types import Plan


class RichProgress:
    """A bar per arm over its warm-up and rounds, with what the arm is doing now."""

    def __init__(self, plan: Plan, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description:>12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[state]}"),
            console=console,
        )
        warmup = min(plan.num_warmup, len(plan.requests))
        a_session = warmup + plan.rounds * len(plan.requests)
        self._tasks = {
            arm.name: self._progress.add_task(
                arm.name,
                total=a_session * plan.order.count(arm.name),
                start=False,
                state="waiting",
            )
            for arm in plan.arms
        }

    def __enter__(self) -> RichProgress:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def starting(self, arm: str, waited_s: float) -> None:
        """The arm's server is not ready yet, after `waited_s` seconds."""
        self._progress.start_task(self._tasks[arm])
        self._progress.update(self._tasks[arm], state=f"server starts, {waited_s:.0f} s")

    def running(self, arm: str) -> None:
        """The arm's server is ready; requests follow."""
        self._progress.start_task(self._tasks[arm])
        self._progress.update(self._tasks[arm], state="requests")

    def advance(self, arm: str) -> None:
        """One request of the arm is done."""
        self._progress.advance(self._tasks[arm])

    def ended(self, arm: str, failure: str) -> None:
        """The arm's session is over; `failure` is "" or why it broke off."""
        state = f"[red]failed: {failure.splitlines()[0][:60]}" if failure else "done"
        self._progress.update(self._tasks[arm], state=state)
        self._progress.stop_task(self._tasks[arm])
