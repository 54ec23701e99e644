"""Loss and exact-match accuracy of a batch on the device, added up without a host synchronisation.

An item is right when every answer token, teacher-forced, is the most likely one: then greedy
decoding gives the whole answer.

Shape letters: A answer tokens, S prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.probe.device import Batch

LENGTH_POWER = 0.5  # an answer of n tokens weighs the root of n: neither its tokens nor it alike


def answer_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Scalar: cross entropy of the answers, by item and length."""
    lengths_S = torch.zeros(batch.num_items, device=logits.device)
    lengths_S.index_add_(0, batch.owner_A, torch.ones_like(batch.owner_A, dtype=torch.float32))
    weight_A = lengths_S.index_select(0, batch.owner_A).pow(-LENGTH_POWER)
    loss_A = functional.cross_entropy(logits.float(), batch.answer_ids_A, reduction="none")
    return (loss_A * weight_A).sum() / weight_A.sum()


class Tally:
    """Right and asked items by task, on the device."""

    def __init__(self, num_tasks: int, device: torch.device) -> None:
        self._right_asked = torch.zeros(2, num_tasks, device=device)

    @torch.no_grad()
    def add(self, logits: Tensor, batch: Batch) -> None:
        """Count a batch."""
        wrong_A = (logits.argmax(-1) != batch.answer_ids_A).float()
        wrong_S = torch.zeros(batch.num_items, device=logits.device)
        wrong_S.index_add_(0, batch.owner_A, wrong_A)
        both = torch.stack([(wrong_S == 0).float(), torch.ones_like(wrong_S)])
        self._right_asked.index_add_(1, batch.task_S, both)

    def read(self) -> tuple[list[int], list[int]]:
        """Right and asked by task; starts again at zero. Waits for the device."""
        right, asked = self._right_asked.int().tolist()
        self._right_asked.zero_()
        return right, asked


def accuracies(
    tasks: Sequence[str], right: Sequence[int], asked: Sequence[int]
) -> dict[str, float]:
    """Accuracy of the tasks that were asked."""
    return {t: r / a for t, r, a in zip(tasks, right, asked, strict=True) if a}


def mix(
    old: Sequence[float], right: Sequence[int], asked: Sequence[int], keep: float
) -> list[float]:
    """Running accuracies: `keep` of the old and the rest of the new, where there is a new."""
    return [
        keep * o + (1 - keep) * r / a if a else o for o, r, a in zip(old, right, asked, strict=True)
    ]
