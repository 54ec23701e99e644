"""Laws of the lever replicate in time: slots are never written while read, nor read too early.

One rank, whose two lanes only write down what is asked of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_moelb.ep.replicas import lever as module
from sglang_moelb.ep.replicas.lever import ReplicateLever
from sglang_moelb.ep.replicas.memory import LayerExperts
from sglang_moelb.ep.replicas.plan import CopyPlan
from sglang_moelb.kernels.row_layout import row_width
from sglang_moelb.types import Topology

NUM_EXPERTS, NUM_SLOTS = 4, 1
SIZES = Topology(num_layers=2, num_experts=NUM_EXPERTS, num_ranks=2, topk=1)
ROWS = torch.zeros(0, 1, dtype=torch.int64)


class Story(list[str]):
    """What happened, and lanes that write it."""

    num_marks = 0

    def mark(self) -> str:
        self.num_marks += 1
        self.append(f"mark m{self.num_marks}")
        return f"m{self.num_marks}"

    @contextmanager
    def aside(self, after: tuple[str, ...]) -> Iterator[None]:
        self.append(f"aside after {' '.join(after)}")
        yield

    def mark_aside(self) -> str:
        self.num_marks += 1
        return f"side{self.num_marks}"

    def wait(self, event: str) -> None:
        self.append(f"wait {event}")


class Normal:
    """SGLang's dispatcher and its part for normal mode in one."""

    num_experts = NUM_EXPERTS

    def __init__(self) -> None:
        self.made_for = 0

    def _get_impl(self) -> Normal:
        return self

    def _get_buffer(self) -> None:
        self.made_for = self.made_for or self.num_experts


@pytest.fixture
def story(monkeypatch: pytest.MonkeyPatch) -> Story:
    told = Story()
    monkeypatch.setattr(module, "pull_experts", lambda *args, **kwargs: told.append("pull"))
    return told


@pytest.fixture
def layers(story: Story) -> list[Any]:
    def apply(layer: Any, dispatch_output: Any) -> Any:
        story.append(f"run {len(layer.w13_weight)} experts")
        return "rows"

    return [SimpleNamespace(quant_method=SimpleNamespace(apply=apply)) for _ in range(2)]


@pytest.fixture
def lever(story: Story, layers: list[Any]) -> ReplicateLever:
    own = torch.zeros(NUM_EXPERTS // 2, 4)
    whole = torch.zeros(NUM_EXPERTS // 2 + NUM_SLOTS, 4)
    experts = LayerExperts(w13=whole, w2=whole, w13_R=(own, own), w2_R=(own, own))
    return ReplicateLever(layers, [experts] * 2, topology=SIZES, rank=0, lanes=story)


PLAN = CopyPlan(
    counts_RW=torch.zeros(2, row_width(NUM_EXPERTS, with_histogram=False), dtype=torch.int32),
    slots_RS=torch.full((2, NUM_SLOTS), -1, dtype=torch.int32),
    quota_ER=torch.zeros(NUM_EXPERTS, 2, dtype=torch.int32),
)


def test_slots_are_written_behind_plan_and_last_run_and_read_behind_the_writing(
    lever: ReplicateLever, layers: list[Any], story: Story
) -> None:
    normal = Normal()
    for layer in (0, 1):
        lever.prepare(layer, normal, PLAN, ROWS)
        assert lever.run(layers[layer], None) == "rows"
    assert story == [
        "mark m1", "aside after m1", "pull", "wait side2", "run 3 experts", "mark m3",
        "mark m4", "aside after m4 m3", "pull", "wait side5", "run 3 experts", "mark m6",
    ]  # fmt: skip


def test_the_dispatcher_sends_to_slots_only_between_plan_and_run(
    lever: ReplicateLever, layers: list[Any]
) -> None:
    normal = Normal()
    lever.prepare(0, normal, PLAN, ROWS)
    assert normal.made_for == NUM_EXPERTS, "the buffer is made for the model's own experts"
    assert normal.num_experts == NUM_EXPERTS + 2 * NUM_SLOTS
    assert lever.run(layers[1], None) is None, "another layer is SGLang's"
    lever.run(layers[0], None)
    assert normal.num_experts == NUM_EXPERTS
    assert lever.run(layers[0], None) is None, "nothing was asked for"


def test_ids_come_in_the_type_that_deepep_takes(lever: ReplicateLever) -> None:
    """SGLang would else make it of them, in a launch of its own before the dispatch."""
    assert lever.prepare(0, Normal(), PLAN, ROWS.int()).dtype == torch.int64


def test_a_pass_that_ends_in_between_leaves_nothing_behind(
    lever: ReplicateLever, layers: list[Any]
) -> None:
    normal = Normal()
    lever.prepare(0, normal, PLAN, ROWS)
    lever.forget()
    assert normal.num_experts == NUM_EXPERTS
    assert lever.run(layers[0], None) is None
    assert lever.told()["num_replicated_layers"] == 0
