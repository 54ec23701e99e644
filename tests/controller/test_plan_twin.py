"""The planner in plain Python and the device op's reference give the same plans."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_moelb.controller import plan

torch = pytest.importorskip("torch")
NUM_EXPERTS, NUM_RANKS = 8, 4


@pytest.mark.parametrize("num_groups", [NUM_EXPERTS, NUM_RANKS])
@pytest.mark.parametrize("seed", range(20))
def test_the_planner_equals_the_device_op(num_groups: int, seed: int) -> None:
    from sglang_moelb.kernels import row_layout
    from sglang_moelb.kernels.plan_cuts import plan_cuts

    rng = np.random.default_rng(seed)
    shape = (NUM_RANKS, NUM_EXPERTS, row_layout.NUM_BINS)
    cuttable_REB = rng.integers(0, 50, shape) * (rng.random(shape) < 0.1)
    protected_RE = rng.integers(0, 40, shape[:2])
    rows_RW = torch.zeros(
        NUM_RANKS, row_layout.row_width(NUM_EXPERTS, with_histogram=True), dtype=torch.int32
    )
    row_layout.histogram_of(rows_RW, NUM_EXPERTS)[:] = torch.from_numpy(cuttable_REB)
    counts_RE5 = row_layout.counts_of(rows_RW, NUM_EXPERTS)
    counts_RE5[..., row_layout.C_PROTECTED_AMOUNT] = torch.from_numpy(protected_RE)

    cuttable_RGB = cuttable_REB.reshape(NUM_RANKS, num_groups, -1, shape[2]).sum(axis=2)
    protected_G = protected_RE.reshape(NUM_RANKS, num_groups, -1).sum(axis=(0, 2))
    total_G = cuttable_RGB.sum(axis=(0, 2))
    capacity_G = (protected_G + total_G * rng.choice([-0.1, 0, 0.5, 1, 2], num_groups)).astype(int)
    for rank in range(NUM_RANKS):
        ours = plan.plan_cuts(cuttable_RGB, protected_G, capacity_G, rank)
        theirs = plan_cuts(
            rows_RW, torch.from_numpy(capacity_G), my_rank=rank, num_experts=NUM_EXPERTS
        )
        assert [a.tolist() for a in ours] == [a.tolist() for a in theirs]


def test_an_amount_means_the_same_to_the_planner_and_to_the_kernels() -> None:
    from sglang_moelb.kernels import row_layout

    assert plan.AMOUNT_ONE == row_layout.AMOUNT_ONE
