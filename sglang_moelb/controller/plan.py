"""The planner of capacity cuts in plain Python: the reference of the device op and the simulator.

All arithmetic is on integers, and every rank that holds the same ones gets the same plan, so no
rank has to be told. The device code mirrors these functions in int64: `>>` is the arithmetic shift
and `//` has a positive divisor, so both round towards minus infinity. Capacities are exact while
amounts of a layer stay below 2**45; quotas are computed in Python's integers, without a bound.

Shape letters: E logical experts, R source ranks, G groups, B bins of a histogram by rank key.
"""

from __future__ import annotations

import numpy as np

from sglang_moelb.types import IntArray

AMOUNT_ONE = 256  # the amount of a row of weight 1.0 under MACS; plain rows weigh 1
Q16_ONE = 1 << 16
Q16_HALF = 1 << 15
MOSTLY_VISION = (3, 5)  # numerator and denominator of 0.6, so that the comparison is exact
MOSTLY_TEXT = (2, 5)


def capacity_rows(factor: float, num_rows: int, num_groups: int) -> int:
    """Rows that a group may keep: floor(factor * num_rows / num_groups), at least 1; 0 for 0 rows.

    Args:
        factor: multiple of the mean rows of a group, above 0.
        num_rows: top-k rows of the layer, over all ranks under scope global, else of one rank.
        num_groups: E at expert level, R at device level.

    1e-9 is added before the floor, so that 1.1 * 10 rows are 11 whatever the binary fraction.
    Runs on the host. Source: Capacity-Aware Inference 4.1; floor and minimum are ours.
    """
    if num_rows == 0:
        return 0
    return max(1, int(factor * num_rows / num_groups + 1e-9))


def macs_capacity(
    base_amount: int, vision_amount: int, amount: int, classes_G: IntArray, rho: float
) -> IntArray:
    """Capacity of each group in amounts under MACS, int64 [G].

    Args:
        base_amount: AMOUNT_ONE * capacity_rows(...), C_base of the paper in amounts.
        vision_amount: amount of all vision rows of the layer.
        amount: amount of all rows of the layer.
        classes_G: +1 mostly vision, -1 mostly text, 0 shared, from `expert_classes`.
        rho: strength, in [0, 1].

    In fixed point with 16 bits of fraction, in this order::

        rho_q16 = floor(rho * 65536 + 0.5)
        R_q16   = (vision_amount << 16) // amount          32768 where amount is 0
        scale_G = 65536 + ((classes_G * rho_q16 * (R_q16 - 32768)) >> 16)
        C_G     = max((base_amount * scale_G) >> 16, base_amount >> 2)

    Runs on the host. Source: MACS, C_e = C_base * (1 + rho * m_e * (R_v - 0.5)); the floor of a
    quarter of C_base is ours.
    """
    rho_q16 = int(rho * Q16_ONE + 0.5)
    share_q16 = (vision_amount << 16) // amount if amount else Q16_HALF
    scale_G = Q16_ONE + ((classes_G.astype(np.int64) * (rho_q16 * (share_q16 - Q16_HALF))) >> 16)
    capacity_G: IntArray = np.maximum((base_amount * scale_G) >> 16, base_amount >> 2)
    return capacity_G


def expert_classes(vision_rows_G: IntArray, rows_G: IntArray) -> IntArray:
    """Class of each group, int64 [G]: +1 if vision share > 0.6, -1 if < 0.4, else 0.

    A group without rows has no share and is class 0. Compared as integers, so all ranks agree.
    Runs on the host. Source: MACS m_e; thresholds and counting in the pass itself are ours.
    """
    vision_num, vision_den = MOSTLY_VISION
    text_num, text_den = MOSTLY_TEXT
    vision_G = vision_rows_G * vision_den > rows_G * vision_num
    text_G = vision_rows_G * text_den < rows_G * text_num
    classes_G: IntArray = vision_G.astype(np.int64) - text_G.astype(np.int64)
    return classes_G


def plan_cuts(
    cuttable_RGB: IntArray, protected_G: IntArray, capacity_G: IntArray, my_rank: int
) -> tuple[IntArray, IntArray]:
    """Where rank `my_rank` cuts each group so that all ranks together keep what fits, exactly.

    Args:
        cuttable_RGB: amounts that may be cut, by source rank, group and bin; int32 or int64.
        protected_G: amounts that must be kept.
        capacity_G: amount that the group may keep.
        my_rank: index on the first axis.

    Returns:
        `cut_bin_G`: -1 where all fits, else the bin in which the room ends: the highest bin such
        that it and the bins above hold more than the room. Bins above are kept whole, bins below
        are dropped. `cut_quota_G`: the amount of the cut bin that this rank keeps, 0 where
        `cut_bin_G` is -1. The quotas of all ranks add up to the rest of the room, and none is more
        than the rank holds in the bin.

    With m the rest of the room, c_r the amounts of the bin in ranks 0..r, and n their total, rank
    r keeps m*c_r // n - m*c_(r-1) // n.

    Example: one group, bins (low, high), rank 0 holds (4, 1), rank 1 holds (2, 2), capacity 6,
    nothing protected. The high bin (3) is kept, 3 are left for the low bin of 6, so the cut bin is
    0 and the quotas are 3*4//6 = 2 and 3*6//6 - 2 = 1.

    Runs on the host. Source: Capacity-Aware Inference 4.1, exact over ranks; the quota is ours.
    """
    total_GB = cuttable_RGB.sum(axis=0, dtype=np.int64)
    down_GB = np.cumsum(total_GB[:, ::-1], axis=1)[:, ::-1]  # this bin and those above it
    room_G = np.maximum(capacity_G - protected_G, 0)
    groups_G = np.arange(total_GB.shape[0])
    overflows_G = down_GB[:, 0] > room_G
    cut_bin_G = np.count_nonzero(down_GB > room_G[:, None], axis=1) - 1
    bin_G = np.maximum(cut_bin_G, 0)
    num_G = np.maximum(total_GB[groups_G, bin_G], 1)
    rest_G = room_G - (down_GB[groups_G, bin_G] - total_GB[groups_G, bin_G])
    held_RG = cuttable_RGB[: my_rank + 1, groups_G, bin_G]
    until_G = held_RG.sum(axis=0, dtype=np.int64)
    before_G = until_G - held_RG[my_rank]
    quota_G = _dealt(rest_G, until_G, num_G) - _dealt(rest_G, before_G, num_G)
    return cut_bin_G.astype(np.int64), np.where(overflows_G, quota_G, 0)


def kept_amount(cuttable_G: IntArray, protected_G: IntArray, capacity_G: IntArray) -> IntArray:
    """Amount that each group keeps: what is protected, and of the rest what finds room.

    Shapes [..., G], int64; `cuttable_G` is the total over ranks and bins. Runs on the host. Ours.
    """
    kept_G: IntArray = protected_G + np.minimum(cuttable_G, np.maximum(capacity_G - protected_G, 0))
    return kept_G


def _dealt(amount_G: IntArray, part_G: IntArray, whole_G: IntArray) -> IntArray:
    # numpy's product would pass 63 bits for 64 ranks of weighted rows
    triples = zip(amount_G.tolist(), part_G.tolist(), whole_G.tolist(), strict=True)
    return np.array([amount * part // whole for amount, part, whole in triples], dtype=np.int64)
