"""What each lever costs the probe in quality, and what load it leaves: all settings, one process.

    python -m benchmarks.probe.sweep --model FOLDER --out sweep.json

The same test items go through the probe once without a lever and once under each setting, in passes
of `--pass-tokens` prompt tokens over `--ranks` EP ranks. The levers are those that serve
(`benchmarks.probe.ranks`); answers are teacher-forced, which gives what greedy decoding would give
as long as they are right. Host or device.

Shape letters: A answer tokens, S items of a pass, T tokens.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor

from benchmarks.probe.batches import exported, fixed_batches, placed, ways_on
from benchmarks.probe.device import Batch
from benchmarks.probe.model import Probe, Ways
from benchmarks.probe.ranks import Ranks
from sglang_moelb.ab.score import mcnemar, paired_difference, ratio_interval, wilson
from sglang_moelb.types import Expansion, Level, Lever, Metric, Policy, Preference, Rule

FACTORS = (0.75, 1.0, 1.25, 1.5, 2.0)
FIRST_INDEX = 3_000_000  # items that no other evaluation uses
MAX_PASS_TOKENS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """How a pass of items was answered; on the host."""

    right_S: NDArray[np.bool_]
    same_S: NDArray[np.bool_]  # every most likely token is the reference's
    logprob_A: NDArray[np.float64]  # of the right token
    owner_A: NDArray[np.int64]  # the item of a token


def settings() -> Iterator[Policy]:
    """Every lever, level, factor and way of choosing that is compared."""
    base = Policy(epoch=1, min_batch_tokens=0)
    for level in Level:
        for factor in FACTORS:
            at = replace(base, level=level, capacity_factor=factor)
            for metric in Metric:
                for preference in Preference:
                    yield replace(at, lever=Lever.DROP, metric=metric, preference=preference)
            for expansion in Expansion:
                yield replace(
                    at, lever=Lever.EXPAND, metric=Metric.SCORE, preference=Preference.UNIFORM,
                    expansion=expansion,
                )  # fmt: skip
            for lever in (Lever.DROP, Lever.EXPAND):
                yield replace(
                    at, lever=lever, metric=Metric.SCORE, preference=Preference.UNIFORM,
                    rule=Rule.MACS,
                )  # fmt: skip


def name_of(policy: Policy) -> str:
    """A short name of a setting without level and factor."""
    if policy.rule is Rule.MACS:
        return f"macs {policy.lever.name.lower()}"
    if policy.lever is Lever.EXPAND:
        return f"expand {policy.expansion.name.lower()}"
    return f"drop {policy.metric.name.lower()} {policy.preference.name.lower()}"


@torch.no_grad()
def answer(
    probe: Probe, batch: Batch, ways: Ways, reference_A: Tensor | None
) -> tuple[Answers, Tensor]:
    """Answers to a pass, and the most likely tokens; without `reference_A` they are their own."""
    logits, _ = probe(batch.prompts, ways=ways)
    best_A = logits.argmax(-1)
    reference_A = best_A if reference_A is None else reference_A
    logprob_A = logits.float().log_softmax(-1).gather(1, batch.answer_ids_A.long()[:, None])[:, 0]
    answers = Answers(
        right_S=_all_of(best_A == batch.answer_ids_A, batch),
        same_S=_all_of(best_A == reference_A, batch),
        logprob_A=logprob_A.double().cpu().numpy(),
        owner_A=batch.owner_A.long().cpu().numpy(),
    )
    return answers, best_A


def _all_of(good_A: Tensor, batch: Batch) -> NDArray[np.bool_]:
    bad_S = torch.zeros(batch.num_items, device=good_A.device)
    bad_S.index_add_(0, batch.owner_A, (~good_A).float())
    return (bad_S == 0).cpu().numpy()


def decoding_of(batch: Batch) -> Tensor:
    """`[T]` bool: the answer tokens, but for the last prompt token of each item."""
    decoding_T = torch.zeros_like(batch.prompts.ids_T, dtype=torch.bool)
    answer_A, owner_A = batch.prompts.answer_A, batch.owner_A
    is_first_A = torch.ones_like(owner_A, dtype=torch.bool)
    is_first_A[1:] = owner_A[1:] != owner_A[:-1]
    decoding_T[answer_A[~is_first_A]] = True
    return decoding_T


def run(
    probe: Probe, batches: Sequence[Batch], ways: Ways, num_ranks: int, policies: Sequence[Policy]
) -> list[dict[str, Any]]:
    """One row for the probe without a lever and one for each policy."""
    plain = [answer(probe, batch, ways, None) for batch in batches]
    rows = [_row([one for one, _ in plain], [one for one, _ in plain])]
    decoding = [decoding_of(batch) for batch in batches]
    for policy in track(policies, description="settings"):
        ranks = Ranks(probe, policy, num_ranks)
        answers = []
        with ranks.lift():
            for batch, decoding_T, (_, best_A) in zip(batches, decoding, plain, strict=True):
                ranks.take(decoding_T)
                answers.append(answer(probe, batch, ways, best_A)[0])
        rows.append(
            {
                "setting": name_of(policy),
                "level": policy.level.name.lower(),
                "factor": policy.capacity_factor,
                **ranks.sums.read(),
                **_row(answers, [one for one, _ in plain]),
            }
        )
    return rows


def _row(answers: Sequence[Answers], plain: Sequence[Answers]) -> dict[str, Any]:
    right, before = (np.concatenate([a.right_S for a in each]) for each in (answers, plain))
    logprob, expected = (np.concatenate([a.logprob_A for a in each]) for each in (answers, plain))
    num_items = len(right)
    num_lost, num_won = int((before & ~right).sum()), int((right & ~before).sum())
    distance, distance_interval = ratio_interval(*_distances(answers, plain))
    return {
        "num_items": num_items,
        "accuracy": float(right.mean()),
        "accuracy_interval": wilson(int(right.sum()), num_items),
        "difference": paired_difference(num_lost, num_won, num_items),
        "mcnemar_p": mcnemar(num_lost, num_won),
        "agreement": float(np.concatenate([a.same_S for a in answers]).mean()),
        "logprob_distance": distance,
        "logprob_distance_interval": distance_interval,
        "logprob_loss": float((expected - logprob).mean()),
    }


def _distances(
    answers: Sequence[Answers], plain: Sequence[Answers]
) -> tuple[list[float], list[int]]:
    """Of each item: its tokens' distances of log-probability added up, and how many tokens."""
    sums: list[float] = []
    nums: list[int] = []
    for one, other in zip(answers, plain, strict=True):
        away_A = np.abs(one.logprob_A - other.logprob_A)
        num_items = len(one.right_S)
        sums += np.bincount(one.owner_A, weights=away_A, minlength=num_items).tolist()
        nums += np.bincount(one.owner_A, minlength=num_items).tolist()
    return sums, nums


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="an exported probe")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--items", type=int, default=2000, help="over all tasks")
    parser.add_argument("--pass-tokens", type=int, default=8192, help="of all ranks, a pass")
    parser.add_argument("--ranks", type=int, default=4, help="EP size")
    parser.add_argument("--every", type=int, default=1, help="take every n-th setting")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if not 1 <= args.pass_tokens <= MAX_PASS_TOKENS:
        parser.error(f"--pass-tokens {args.pass_tokens}: use 1 to {MAX_PASS_TOKENS}")
    device = torch.device(args.device)
    ways = ways_on(device)
    probe = placed(exported(args.model), device, ways)
    batches = fixed_batches(
        FIRST_INDEX, args.items, args.pass_tokens, args.workers, device, ways
    )
    rows = run(probe, batches, ways, args.ranks, list(settings())[:: args.every])
    facts = {"ranks": args.ranks, "pass_tokens": args.pass_tokens, "passes": len(batches)}
    args.out.write_text(json.dumps({**facts, "device": args.device, "rows": rows}) + "\n")
    print(f"{len(rows)} rows, {rows[0]['num_items']} items: {args.out}")


if __name__ == "__main__":
    main()
