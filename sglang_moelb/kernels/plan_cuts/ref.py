"""Reference of `plan_cuts` in plain torch. Shape letters as in the package, B bins."""

from __future__ import annotations

from torch import Tensor

from sglang_moelb.kernels import row_layout as layout

# m*c passes 63 bits for 64 ranks of weighted rows, so it is divided in two digits of this size.
DIGIT_BITS = 17


def plan_cuts(
    rows_RW: Tensor, capacity_G: Tensor, *, my_rank: int, num_experts: int
) -> tuple[Tensor, Tensor]:
    """See `sglang_moelb.kernels.plan_cuts`. Runs wherever its tensors are."""
    num_groups = capacity_G.numel()
    check_plan(rows_RW, num_groups, my_rank, num_experts)
    grouped = (len(rows_RW), num_groups, num_experts // num_groups)
    histogram_REB = layout.histogram_of(rows_RW, num_experts)
    histogram_RGB = histogram_REB.view(*grouped, layout.NUM_BINS).sum(dim=2)
    counts_RE5 = layout.counts_of(rows_RW, num_experts)
    protected_RE = counts_RE5[..., layout.C_PROTECTED_AMOUNT]
    protected_G = protected_RE.view(grouped).sum(dim=(0, 2))
    room_G = (capacity_G - protected_G).clamp(min=0)

    total_GB = histogram_RGB.sum(dim=0)
    from_top_GB = total_GB.flip(1).cumsum(dim=1).flip(1)
    is_cut_G = from_top_GB[:, 0] > room_G
    exceeds_GB = from_top_GB > room_G[:, None]
    cut_bin_G = exceeds_GB.sum(dim=1) - 1  # sums grow towards bin 0, so the top one that exceeds

    at = cut_bin_G.clamp(min=0)[:, None]
    in_bin_G = total_GB.gather(1, at)[:, 0].clamp(min=1)
    left_G = room_G - (from_top_GB.gather(1, at)[:, 0] - in_bin_G)
    in_bin_RG = histogram_RGB.gather(2, at.expand(len(rows_RW), -1, -1))[..., 0]
    before_G = in_bin_RG[:my_rank].sum(dim=0)
    through_G = before_G + in_bin_RG[my_rank]
    quota_G = _share(left_G, through_G, in_bin_G) - _share(left_G, before_G, in_bin_G)
    return cut_bin_G.int(), quota_G.where(is_cut_G, 0).int()


def check_plan(rows_RW: Tensor, num_groups: int, my_rank: int, num_experts: int) -> None:
    """Raise ValueError for shapes that do not belong together. Host only, no sync."""
    if num_groups == 0 or num_experts % num_groups:
        raise ValueError(f"{num_experts} experts cannot be split evenly in {num_groups} groups")
    if not 0 <= my_rank < len(rows_RW):
        raise ValueError(f"my_rank {my_rank} is not one of the {len(rows_RW)} rows given")
    layout.histogram_of(rows_RW, num_experts)


def _share(amount: Tensor, part: Tensor, whole: Tensor) -> Tensor:
    """amount * part // whole without overflow, for 0 <= amount, part <= whole < 2**34."""
    high = amount * (part >> DIGIT_BITS)
    low = amount * (part & ((1 << DIGIT_BITS) - 1))
    return ((high // whole) << DIGIT_BITS) + (((high % whole) << DIGIT_BITS) + low) // whole
