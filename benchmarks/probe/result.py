"""What an evaluation leaves: graded answers, accuracy by task, and a comparison; kept as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from benchmarks.probe.item import Item, Modality
from benchmarks.probe.suite import ProbeError, digest
from benchmarks.probe.tasks import TASKS
from sglang_moelb.ab.score import Interval, mean_interval, wilson
from sglang_moelb.ab.types import Outcome

FORMAT = "probe-evaluation-1"
GROUPS: tuple[str, ...] = ("all", "vision", "text")


class Graded(msgspec.Struct, frozen=True, kw_only=True):
    """One item and what the server answered; `error` is "" or why there is no answer."""

    task: str
    modality: Modality
    index: int
    digest: int
    answer: str
    text: str
    is_correct: bool
    num_prompt_tokens: int
    latency_ms: float
    token_ids: tuple[int, ...] = ()
    token_texts: tuple[str | None, ...] = ()
    logprobs: tuple[float | None, ...] = ()
    error: str = ""


class Accuracy(msgspec.Struct, frozen=True, kw_only=True):
    """Share of right answers of a task, of a modality or of all, with its Wilson interval."""

    name: str
    num_items: int
    num_correct: int
    accuracy: float
    interval: Interval


class Mean(msgspec.Struct, frozen=True, kw_only=True):
    """A number and its 95 % interval."""

    value: float
    interval: Interval


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """Items of a task, a modality or all that both servers answered, one against the other.

    `num_lost` items are right at the reference only, `num_won` here only. `logprob_distance` is
    the mean |difference| of the log-probability of a token, in nats, over the tokens up to the
    first one that differs; None where no server sent log-probabilities.
    """

    name: str
    num_pairs: int
    num_lost: int
    num_won: int
    difference: Mean
    p_value: float
    smallest_difference: float
    agreement: Mean
    token_share: float
    logprob_distance: Mean | None
    max_logprob_distance: float


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a run. `failure` is "" or why it ended early; `is_partial` if items lack."""

    format: str = FORMAT
    url: str
    model: str
    seed: int
    num_items: int
    tasks: tuple[str, ...]
    wall_s: float
    is_partial: bool
    failure: str
    average: Mean | None  # over tasks, each counting alike
    accuracy: tuple[Accuracy, ...]
    reference: str = ""  # URL or file
    comparison: tuple[Compared, ...] = ()
    items: tuple[Graded, ...]


def grade(item: Item, outcome: Outcome) -> Graded:
    """Right if the answer is exact, character by character."""
    return Graded(
        task=item.task,
        modality=TASKS[item.task].modality,
        index=item.index,
        digest=digest(item),
        answer=item.answer,
        text=outcome.text,
        is_correct=not outcome.error and outcome.text == item.answer,
        num_prompt_tokens=outcome.num_prompt_tokens,
        latency_ms=outcome.latency_ms,
        token_ids=outcome.token_ids,
        token_texts=outcome.token_texts,
        logprobs=outcome.logprobs,
        error=outcome.error,
    )


def answered(items: Iterable[Graded], name: str = "all") -> list[Graded]:
    """Items with an answer, of all, of a modality or of a task."""
    return [item for item in items if not item.error and name in ("all", item.modality, item.task)]


def accuracies(items: Sequence[Graded]) -> tuple[Accuracy, ...]:
    """Rows for all, by modality and by task, where there are any items."""
    rows = []
    for name in (*GROUPS, *dict.fromkeys(item.task for item in items)):
        of_name = answered(items, name)
        if of_name:
            num_correct = sum(item.is_correct for item in of_name)
            rows.append(
                Accuracy(
                    name=name,
                    num_items=len(of_name),
                    num_correct=num_correct,
                    accuracy=num_correct / len(of_name),
                    interval=wilson(num_correct, len(of_name)),
                )
            )
    return tuple(rows)


def average(rows: Sequence[Accuracy]) -> Mean | None:
    """The mean of the tasks' accuracies, or None without a task."""
    counts = [(row.num_correct, row.num_items) for row in rows if row.name not in GROUPS]
    if not counts:
        return None
    value, interval = mean_interval(counts)
    return Mean(value=value, interval=interval)


def write_result(path: Path, evaluation: Evaluation) -> None:
    """Write `evaluation` as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(evaluation), indent=1) + b"\n")


def read_result(path: Path) -> Evaluation:
    """Read what `write_result` wrote. Raises `ProbeError` if the file is not that."""
    try:
        evaluation = msgspec.json.decode(path.read_bytes(), type=Evaluation)
    except OSError as error:
        raise ProbeError(
            f"--reference {path}: cannot be read ({error.strerror}). Give the JSON file that an "
            "evaluation wrote with --out."
        ) from error
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ProbeError(
            f"--reference {path}: is no result of an evaluation ({error}). Give the JSON file "
            "that an evaluation wrote with --out, whole."
        ) from error
    if evaluation.format != FORMAT:
        raise ProbeError(
            f"--reference {path}: its format is {evaluation.format!r}, this program reads "
            f"{FORMAT!r}. Evaluate the reference again."
        )
    return evaluation
