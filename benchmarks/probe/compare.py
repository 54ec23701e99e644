"""One evaluation against another of the same items. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.probe.result import GROUPS, Compared, Evaluation, Graded, Mean, answered
from benchmarks.probe.suite import ProbeError, Suite, digest
from benchmarks.probe.tasks import make_item
from sglang_moelb.ab.agreement import Pair
from sglang_moelb.ab.agreement import compare as compare_outcomes
from sglang_moelb.ab.score import (
    mcnemar,
    paired_difference,
    ratio_interval,
    smallest_difference,
    wilson,
)
from sglang_moelb.ab.types import Outcome


def compare(items: Sequence[Graded], reference: Sequence[Graded]) -> tuple[Compared, ...]:
    """Rows for all, by modality and by task, of the items that both have answered.

    Raises `ProbeError` if they have none in common, or if an item is not the same question.
    """
    theirs = {(item.task, item.index): item for item in answered(reference)}
    mine = [item for item in answered(items) if (item.task, item.index) in theirs]
    if not mine:
        raise ProbeError(
            "the reference has no item in common with this evaluation. Evaluate both with the "
            "same --seed and --tasks."
        )
    for item in mine:
        if theirs[item.task, item.index].digest != item.digest:
            raise ProbeError(
                f"item {item.index} of task {item.task!r} is another question in the reference. "
                "Evaluate both with the same --seed and the same version of the tasks."
            )
    rows = []
    for name in (*GROUPS, *dict.fromkeys(item.task for item in mine)):
        pairs = [(item, theirs[item.task, item.index]) for item in answered(mine, name)]
        if pairs:
            rows.append(_row(name, pairs))
    return tuple(rows)


def check_reference(reference: Evaluation, suite: Suite, where: str) -> None:
    """Whether `reference` asked what `suite` asks, by one item of each task it has.

    Raises `ProbeError` starting with `where`.
    """
    if reference.seed != suite.seed:
        raise ProbeError(
            f"{where}: was evaluated with --seed {reference.seed}, this run has --seed "
            f"{suite.seed}. Give the same."
        )
    first = {item.task: item for item in reversed(answered(reference.items))}
    common = [first[task] for task in suite.tasks if task in first]
    if not common:
        raise ProbeError(
            f"{where}: has answers to {','.join(first) or 'no task'}, this run asks "
            f"{','.join(suite.tasks)}. Give a reference with some of the same tasks."
        )
    for item in common:
        ours = make_item(item.task, "test", item.index, seed=suite.seed)
        if digest(ours) != item.digest:
            raise ProbeError(
                f"{where}: item {item.index} of task {item.task!r} was another question there. "
                "Evaluate the reference again with this version of the tasks."
            )


def _row(name: str, pairs: Sequence[tuple[Graded, Graded]]) -> Compared:
    num_lost = sum(ref.is_correct and not item.is_correct for item, ref in pairs)
    num_won = sum(item.is_correct and not ref.is_correct for item, ref in pairs)
    num = len(pairs)
    difference, interval = paired_difference(num_lost, num_won, num)
    tokens = [compare_outcomes(_outcome(ref), _outcome(item)) for item, ref in pairs]
    num_equal = sum(pair.is_equal for pair in tokens)
    num_longest = sum(pair.num_longest for pair in tokens)
    return Compared(
        name=name,
        num_pairs=num,
        num_lost=num_lost,
        num_won=num_won,
        difference=Mean(value=difference, interval=interval),
        p_value=mcnemar(num_lost, num_won),
        smallest_difference=smallest_difference(num, (num_lost + num_won) / num),
        agreement=Mean(value=num_equal / num, interval=wilson(num_equal, num)),
        token_share=sum(p.num_common for p in tokens) / num_longest if num_longest else 1.0,
        logprob_distance=_distance(tokens),
        max_logprob_distance=max((d for pair in tokens for d in pair.differences), default=0.0),
    )


def _distance(tokens: Sequence[Pair]) -> Mean | None:
    nums = [len(pair.differences) for pair in tokens]
    if not sum(nums):
        return None
    value, interval = ratio_interval([sum(pair.differences) for pair in tokens], nums)
    return Mean(value=value, interval=interval)


def _outcome(item: Graded) -> Outcome:
    return Outcome(
        request_id=item.index,
        kind="image" if item.modality == "vision" else "text",
        round=0,
        start_s=0.0,
        token_ids=item.token_ids,
        token_texts=item.token_texts,
        logprobs=item.logprobs,
    )
