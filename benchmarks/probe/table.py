"""The result of an evaluation as tables on a terminal."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from benchmarks.probe.result import GROUPS, Accuracy, Compared, Evaluation, Mean
from sglang_moelb.ab.score import Interval


def tables(evaluation: Evaluation) -> Group:
    """Accuracy, and the comparison where there is one."""
    parts: list[Text | Table] = [_heading(evaluation), _accuracy_table(evaluation)]
    if evaluation.comparison:
        parts += [Text(f"against {evaluation.reference}"), _comparison_table(evaluation)]
    return Group(*parts)


def closing_line(evaluation: Evaluation) -> str:
    """One sentence on the whole: average over tasks, and what can be resolved against what."""
    if evaluation.average is None:
        return "no item was answered"
    mean = evaluation.average
    text = f"average over tasks {mean.value:.1%} ({_interval(mean.interval)})"
    if evaluation.comparison:
        row = evaluation.comparison[0]
        text += (
            f"; against {evaluation.reference}: {_signed(row.difference)}, p = {row.p_value:.3g}; "
            f"{row.num_pairs} items resolve {row.smallest_difference * 100:.2f} points"
        )
    return text


def _heading(evaluation: Evaluation) -> Text:
    heading = Text(f"{evaluation.model} at {evaluation.url}, seed {evaluation.seed}")
    if evaluation.is_partial:
        num = sum(not item.error for item in evaluation.items)
        heading.append(f": PARTIAL, {num} of {evaluation.num_items} items", "bold red")
    return heading


def _accuracy_table(evaluation: Evaluation) -> Table:
    table = Table()
    for column in ("task", "items", "right", "accuracy", "95 %"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for i, row in enumerate(evaluation.accuracy):
        is_last_group = row.name in GROUPS and not _is_group(evaluation.accuracy, i + 1)
        table.add_row(
            row.name,
            str(row.num_items),
            str(row.num_correct),
            f"{row.accuracy:.1%}",
            _interval(row.interval),
            end_section=is_last_group,
        )
    return table


def _is_group(rows: tuple[Accuracy, ...] | tuple[Compared, ...], i: int) -> bool:
    return i < len(rows) and rows[i].name in GROUPS


def _comparison_table(evaluation: Evaluation) -> Table:
    table = Table()
    columns = ("task", "pairs", "lost", "won", "difference, points", "p", "resolves", "same answer")
    for column in (*columns, "log-prob distance", "max"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for i, row in enumerate(evaluation.comparison):
        distance = row.logprob_distance
        table.add_row(
            row.name,
            str(row.num_pairs),
            str(row.num_lost),
            str(row.num_won),
            _signed(row.difference),
            f"{row.p_value:.3g}",
            f"{row.smallest_difference * 100:.2f}",
            f"{row.agreement.value:.1%}",
            _small(distance) if distance else "unknown",
            f"{row.max_logprob_distance:.3g}" if distance else "",
            end_section=row.name in GROUPS and not _is_group(evaluation.comparison, i + 1),
        )
    return table


def _interval(interval: Interval) -> str:
    return f"{interval[0] * 100:.1f} to {interval[1] * 100:.1f}"


def _signed(mean: Mean) -> str:
    low, high = mean.interval
    return f"{mean.value * 100:+.2f} ({low * 100:+.2f} to {high * 100:+.2f})"


def _small(mean: Mean) -> str:
    return f"{mean.value:.2g} ({max(0.0, mean.interval[0]):.2g} to {mean.interval[1]:.2g})"
