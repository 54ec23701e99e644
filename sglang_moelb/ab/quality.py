"""Right and wrong answers of an arm, and what the arm lost or won against the first.

For requests whose answer is known. The unit of chance is a request: a greedy answer that is asked
for again in another round is nearly the same answer, so rounds are averaged within the request and
do not count as further items. Host only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sglang_moelb.ab.measure import KINDS
from sglang_moelb.ab.result import Accuracy, Estimate, PairedAccuracy
from sglang_moelb.ab.score import mcnemar, paired_difference, smallest_difference, wilson
from sglang_moelb.ab.types import Outcome, Request

Key = tuple[int, int]  # round, request_id


@dataclass(frozen=True, slots=True)
class Graded:
    """The answers of one arm that were judged: whether each is right, by round and request."""

    requests: Mapping[int, Request]
    is_right: Mapping[Key, bool]


def is_right(text: str, answer: str) -> bool:
    """Whether `text` is `answer`, white space around either left out. Example: "42 " is "42"."""
    return text.strip() == answer.strip()


def grade(requests: Iterable[Request], outcomes: Iterable[Outcome]) -> Graded:
    """Judge the outcomes that came back, of the requests that carry an answer."""
    known = {r.request_id: r.answer for r in requests if r.answer is not None}
    return Graded(
        requests={r.request_id: r for r in requests if r.answer is not None},
        is_right={
            (o.round, o.request_id): is_right(o.text, answer)
            for o in outcomes
            if not o.error and (answer := known.get(o.request_id)) is not None
        },
    )


def accuracy(graded: Graded) -> list[Accuracy]:
    """Rows for all, for image and text requests, and for each group, where there are answers."""
    rows = []
    for name, shares in _by_name(graded, graded.is_right).items():
        num_right = sum(sum(marks) for marks in shares)
        num_answers = sum(len(marks) for marks in shares)
        share = sum(sum(marks) / len(marks) for marks in shares) / len(shares)
        rows.append(
            Accuracy(
                name=name,
                num_requests=len(shares),
                num_answers=num_answers,
                num_right=num_right,
                accuracy=Estimate(value=share, interval=wilson(share * len(shares), len(shares))),
            )
        )
    return rows


def compare_accuracy(base: Graded, other: Graded) -> list[PairedAccuracy]:
    """What `other` lost or won against `base`, over the answers that both have given.

    A request counts as lost where it was right less often, over the rounds, and as won where it
    was right more often; with one round McNemar's test is over single answers.
    """
    common = {key: right for key, right in other.is_right.items() if key in base.is_right}
    changes = {key: int(right) - int(base.is_right[key]) for key, right in common.items()}
    rows = []
    for name, by_request in _by_name(other, changes).items():
        means = [sum(marks) / len(marks) for marks in by_request]
        num_lost, num_won = sum(m < 0 for m in means), sum(m > 0 for m in means)
        lost, won = -sum(m for m in means if m < 0), sum(m for m in means if m > 0)
        value, interval = paired_difference(lost, won, len(means))
        rows.append(
            PairedAccuracy(
                name=name,
                num_requests=len(means),
                num_lost=num_lost,
                num_won=num_won,
                difference=Estimate(value=value, interval=interval),
                p_value=mcnemar(num_lost, num_won),
                smallest_difference=smallest_difference(
                    len(means), (num_lost + num_won) / len(means)
                ),
            )
        )
    return rows


def _by_name(graded: Graded, marks: Mapping[Key, int]) -> dict[str, list[Sequence[int]]]:
    """The marks of each request, one a round, under every name that the request counts for."""
    by_request: defaultdict[int, list[int]] = defaultdict(list)
    for (_, request_id), mark in sorted(marks.items()):
        by_request[request_id].append(mark)
    groups = sorted({graded.requests[i].group for i in by_request} - {""})
    found: dict[str, list[Sequence[int]]] = {name: [] for name in (*KINDS, *groups)}
    for request_id, of_request in by_request.items():
        request = graded.requests[request_id]
        for name in ("all", request.kind, *([request.group] if request.group else [])):
            found[name].append(of_request)
    return {name: rows for name, rows in found.items() if rows}
