"""What the lever replicate would leave of a pass, for all its layers at once.

The planner itself (`place_replicas`) takes 0.6 to 2.5 ms a layer on the host, so this estimates
what it would reach: a limit of a rank's time is met if the slots of the ranks with room suffice for
the experts that the ranks above it would lose, taken whole, the largest first. Only an expert
larger than the largest room counts twice, since it is split. On 400 random routings of 2 to 16
ranks with 1 to 8 slots its max/mean was 0.003 off on average and 0.14 at most, with one slot.

Shape letters: L MoE layers, E logical experts, R ranks, C limits tried, K experts of
a rank, the largest first where sorted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sglang_moelb.controller.load import PassLoad, balance_of
from sglang_moelb.controller.project_downgrade import Projection
from sglang_moelb.types import IntArray, Lever, Policy, Topology

LIMITS_C = np.array([0.0, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0])  # of max less mean, over mean


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyRule:
    """The knobs of the lever replicate, and the copies that a rank has memory for."""

    policy: Policy
    num_slots: int

    def made(self, load: PassLoad) -> bool:
        """Whether the pass was run under this very rule."""
        policy, other = self.policy, load.record.policy
        return load.record.used_lever is Lever.REPLICATE and (
            (policy.min_copy_rows, policy.send_rows, policy.receive_rows)
            == (other.min_copy_rows, other.send_rows, other.receive_rows)
        )


def replicated(load: PassLoad, topology: Topology, rule: CopyRule) -> Projection:
    """What the lever replicate would have left of one pass: what it did leave, if it acted in it.

    Runs on the host. Ours.
    """
    copies_LR = load.record.num_copies_LR
    if rule.made(load) and copies_LR is not None:
        max_L, copies_L = load.record.rows_after_LR.max(axis=1), copies_LR.max(axis=1)
    else:
        rows_LE = load.record.rows_LEM[..., 0] + load.record.rows_LEM[..., 1]
        max_L, copies_L = after_copies(rows_LE.reshape(*load.rows_LR.shape, -1), rule)
    return Projection(
        lever=Lever.REPLICATE,
        max_rows_L=max_L,
        balance=float(balance_of(max_L, load.rows_L, topology.num_ranks).mean()),
        dropped_share=0.0,
        slowest_rows=int(max_L.sum()),
        num_copies=int(copies_L.sum()),
    )


def after_copies(rows_LRK: IntArray, rule: CopyRule) -> tuple[IntArray, IntArray]:
    """Rows of the fullest rank of each layer, and the copies to the rank that receives most in it.

    The copies are taken to be spread evenly over the ranks that have room for one.

    Args:
        rows_LRK: rows of each expert by the rank that holds it.
        rule: slots and knobs; what copies cost counts as rows.

    Runs on the host. Ours.

    Example: two ranks of two experts with rows [[50, 30], [10, 10]] and a slot each: the mean is
    50, which expert 0 alone can bring rank 0 to, so 50 and 1 copy.
    """
    num_layers, num_ranks, size = rows_LRK.shape
    policy = rule.policy
    least = max(policy.min_copy_rows, policy.send_rows + 1)
    load_LR = rows_LRK.sum(axis=2)
    order_LR = np.argsort(-load_LR, axis=1, kind="stable")
    load_LR = np.take_along_axis(load_LR, order_LR, axis=1)
    limit_LC = _limits(load_LR)
    over_LCR = load_LR[:, None, :] - limit_LC[:, :, None]
    need_LCR, room_LCR = np.maximum(over_LCR, 0), np.maximum(-over_LCR - policy.receive_rows, 0)

    num_top = min(size, max(rule.num_slots * (num_ranks - 1), 1))
    top_LRK = np.sort(rows_LRK, axis=2)[:, :, ::-1][:, :, :num_top]
    top_LRK = np.take_along_axis(top_LRK, order_LR[:, :, None], axis=1)
    freed_LRK = np.where(top_LRK >= least, top_LRK - policy.send_rows, 0)
    freed_by = np.zeros((num_layers, num_ranks, num_top + 1), dtype=np.int64)
    np.cumsum(freed_LRK, axis=2, out=freed_by[:, :, 1:])  # by so many of the largest

    asked_LCR = (freed_by[:, None, :, 1:] < need_LCR[..., None]).sum(axis=3) + 1
    asked_LCR = np.minimum(asked_LCR, num_top) * (need_LCR > 0)
    slots_LC = _free_slots(top_LRK, asked_LCR, room_LCR, least, rule.num_slots)
    earlier_LCR = asked_LCR.cumsum(axis=2) - asked_LCR
    given_LCR = np.clip(slots_LC[:, :, None] - earlier_LCR, 0, asked_LCR)
    first_LR = np.arange(num_layers * num_ranks).reshape(num_layers, num_ranks) * (num_top + 1)
    freed_LCR = freed_by.ravel()[first_LR[:, None, :] + given_LCR]
    missed_LC = np.maximum(need_LCR - freed_LCR, 0).max(axis=2)
    taken_LC = np.where(room_LCR >= least, room_LCR, 0).sum(axis=2)
    missed_LC = np.maximum(missed_LC, need_LCR.sum(axis=2) - taken_LC)
    after_LC = limit_LC + missed_LC
    best_L1 = after_LC.argmin(axis=1)[:, None]
    num_to_LC = np.maximum((room_LCR >= least).sum(axis=2), 1)
    copies_LC = np.clip(-(-given_LCR.sum(axis=2) // num_to_LC), 1, rule.num_slots)
    after_L, copies_L = (
        np.take_along_axis(one_LC, best_L1, axis=1)[:, 0] for one_LC in (after_LC, copies_LC)
    )
    return after_L, copies_L * (after_L < load_LR[:, 0])


def _limits(load_LR: IntArray) -> IntArray:
    """The limits tried; the last copies nothing, so the estimate is never worse than that."""
    mean_L1 = -(-load_LR.sum(axis=1, keepdims=True) // load_LR.shape[1])
    above_LC = ((load_LR[:, :1] - mean_L1) * LIMITS_C).astype(np.int64)
    limit_LC: IntArray = mean_L1 + above_LC
    return limit_LC


def _free_slots(
    top_LRK: IntArray, asked_LCR: IntArray, room_LCR: IntArray, least: int, num_slots: int
) -> IntArray:
    """Slots of the ranks with room, [L, C], less those that split experts take."""
    num_to_LC = (room_LCR >= least).sum(axis=2)
    is_split = top_LRK[:, None, :, 0] > room_LCR.max(axis=2)[:, :, None]
    num_split_LC = np.minimum(is_split.sum(axis=2), asked_LCR[:, :, 0])
    slots_LC: IntArray = num_slots * num_to_LC - np.minimum(
        num_split_LC, np.maximum(num_to_LC - 1, 0)
    )
    return slots_LC
