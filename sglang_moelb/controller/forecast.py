"""What each lever would have left of the passes of the window, had it been on in all of them.

A projection applies the rule of a lever to the counts of one pass; a forecast weighs the
projections of the window with the cost model. Projections are exact for `drop` under scope global,
the plain rule and protected tokens spread evenly over experts; otherwise estimates:

- scope source needs counts per source rank, which a record lacks: it is taken as global. With equal
  batches on all ranks the two agree.
- MACS: rows weigh their mean, 1.0 for text and 0.5 for vision (sigmoid of a zero-mean score).
- expand fills what room is left with rows of the rank's own tokens, see `_filled`.

Shape letters: L MoE layers, E logical experts, R ranks, G groups, M modalities (text, vision),
V levers, P passes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from sglang_moelb.controller.cost import CostModel, StepTimes
from sglang_moelb.controller.load import UNLEARNT, PassLoad, balance_of
from sglang_moelb.controller.low_cost import LowCost
from sglang_moelb.controller.own_time import OwnTimes, size_of
from sglang_moelb.controller.plan import (
    AMOUNT_ONE,
    capacity_rows,
    expert_classes,
    kept_amount,
    macs_capacity,
)
from sglang_moelb.controller.project_downgrade import Projection, downgraded
from sglang_moelb.controller.project_replicate import CopyRule, replicated
from sglang_moelb.controller.quality import LossModel
from sglang_moelb.types import (
    IntArray,
    Level,
    Lever,
    LeverForecast,
    Policy,
    Preference,
    Rule,
    Topology,
)

FORECAST_LEVERS = (Lever.EXPAND, Lever.DROP)
MACS_AMOUNTS_M = np.array([AMOUNT_ONE, AMOUNT_ONE // 2], dtype=np.int64)
TEXT, VISION = 0, 1
LOSING_SHARE = 0.05  # of a step


def project(
    load: PassLoad,
    topology: Topology,
    capacity: Policy,
    downgrade: Policy | None = None,
    low_cost: LowCost = UNLEARNT,
    copies: CopyRule | None = None,
) -> tuple[Projection, ...]:
    """Projections of all levers onto one pass, in the order of FORECAST_LEVERS.

    `capacity` gives the capacity knobs of drop and expand, `downgrade` those of downgrade and
    `copies` those of replicate, which are left out without them and else come last. Runs on the
    host. Source: Capacity-Aware Inference 4.1, MACS, ReaLB; estimates as in the module docstring
    are ours.
    """
    base_L = _base_capacities(load, topology, capacity)
    if capacity.rule == Rule.PLAIN:
        capacity_LG = np.array(base_L, dtype=np.int64)[:, None]
        by_rank = capacity.level == Level.DEVICE
        rows_LG = load.rows_LR if by_rank else _both(load.record.rows_LEM)
        kept_LG = _kept_plain(load, rows_LG, capacity_LG, topology, capacity.level)
        kept_rows_LG, room_LG = kept_LG, np.maximum(capacity_LG - kept_LG, 0)
    else:
        rows_LGM = _groups(load, topology, capacity.level)
        capacity_LG = _macs_capacities(rows_LGM, base_L, capacity.macs_rho)
        kept_LG, kept_rows_LG = _kept_macs(load, rows_LGM, capacity_LG, capacity.preference)
        room_LG = np.maximum(capacity_LG - kept_LG, 0) // AMOUNT_ONE
    drop_LR = _by_rank(kept_rows_LG, topology)
    expand_LR = drop_LR + _filled(load, room_LG, topology, capacity)
    num_rows = int(load.rows_L.sum())
    dropped_share = (num_rows - int(drop_LR.sum())) / max(num_rows, 1)
    projections = _projections(np.array([expand_LR, drop_LR]), dropped_share)
    if downgrade is not None:
        projections = (*projections, downgraded(load, topology, downgrade, low_cost))
    if copies is not None:
        projections = (*projections, replicated(load, topology, copies))
    return projections


def forecast(
    loads: Sequence[PassLoad],
    projections: Sequence[tuple[Projection, ...]],
    *,
    cost: CostModel,
    times: StepTimes,
    loss: LossModel,
    own: OwnTimes,
    capacity: Policy,
    copy_ms: float = 0.0,
    num_newest: int = 0,
) -> tuple[LeverForecast, ...]:
    """Forecasts of all levers over the window; `projections` are those of `loads`, in order.

    The gain is the time saved in the experts of the slowest rank less what the lever itself takes
    and what copies of experts do not hide, `copy_ms` each on the rank with most, as a share of the
    timed steps without a lever; it is negative where expansion would add more than it spares, and
    where passes are so short that the lever takes more. Where it would have taken LOSING_SHARE of
    the `num_newest` passes beyond what it saved, the gain is as if all were like those: passes that
    have become short need not wait for the window to forget the long ones. The lost mass share is
    the dropped share times the mass of a dropped row. Runs on the host. Ours.
    """
    if not loads:
        return ()
    timed = [at for at, is_timed in enumerate(times.timed_P.tolist()) if is_timed]
    newest = timed[-num_newest:] if num_newest else []
    newest_ms = math.fsum([loads[at].record.step_ms for at in newest])
    sizes, newest_sizes = (
        Counter([size_of(loads[at].num_tokens) for at in chosen]) for chosen in (timed, newest)
    )
    before_P = [load.slowest_rows for load in loads]
    forecasts = []
    for of_lever in zip(*projections, strict=True):
        lever = of_lever[0].lever
        spared_ms, exposed_ms = _spared_and_exposed(timed, before_P, of_lever, cost, copy_ms)
        saved_ms = spared_ms - exposed_ms - own.extra_ms(lever, sizes)
        spared_ms, exposed_ms = _spared_and_exposed(newest, before_P, of_lever, cost, copy_ms)
        lost_ms = own.extra_ms(lever, newest_sizes) + exposed_ms - max(spared_ms, 0.0)
        if lost_ms > LOSING_SHARE * newest_ms:
            saved_ms = min(saved_ms, -lost_ms * len(timed) / len(newest))
        forecasts.append(_forecast_one(of_lever, saved_ms, times, loss, capacity))
    return tuple(forecasts)


def _projections(left_VLR: IntArray, dropped_share: float) -> tuple[Projection, ...]:
    _, num_layers, num_ranks = left_VLR.shape
    max_VL = left_VLR.max(axis=2)
    balance_V = balance_of(max_VL, left_VLR.sum(axis=2), num_ranks).sum(axis=1) / num_layers
    told = zip(
        FORECAST_LEVERS, max_VL, balance_V.tolist(), max_VL.sum(axis=1).tolist(), strict=True
    )
    return tuple(
        Projection(
            lever=lever,
            max_rows_L=max_L,
            balance=balance,
            dropped_share=dropped_share,
            slowest_rows=slowest_rows,
        )
        for lever, max_L, balance, slowest_rows in told
    )


def _spared_and_exposed(
    chosen: Sequence[int],
    before_P: Sequence[int],
    left_P: Sequence[Projection],
    cost: CostModel,
    copy_ms: float,
) -> tuple[float, float]:
    """What a lever spares in the experts of the passes `chosen`, and what its copies add there."""
    spared_rows = sum([before_P[at] - left_P[at].slowest_rows for at in chosen])
    num_copies = sum([left_P[at].num_copies for at in chosen])
    return cost.ms_per_row * spared_rows, copy_ms * num_copies


def _forecast_one(
    projections: Sequence[Projection],
    saved_ms: float,
    times: StepTimes,
    loss: LossModel,
    capacity: Policy,
) -> LeverForecast:
    lever = projections[0].lever
    dropped_share = math.fsum([p.dropped_share for p in projections]) / len(projections)
    return LeverForecast(
        lever=lever,
        balance=math.fsum([p.balance for p in projections]) / len(projections),
        gain=saved_ms / times.base_ms if times.base_ms > 0.0 else 0.0,
        lost_mass_share=dropped_share * loss.mass_per_dropped_row(lever, capacity.metric)
        if dropped_share
        else 0.0,
        low_share=math.fsum([p.low_share for p in projections]) / len(projections),
    )


def _groups(load: PassLoad, topology: Topology, level: Level) -> IntArray:
    rows_LEM = load.record.rows_LEM
    if level == Level.EXPERT:
        return rows_LEM
    vision_LR = _by_rank(rows_LEM[..., VISION], topology)
    return np.stack([load.rows_LR - vision_LR, vision_LR], axis=2)


def _by_rank(rows_LG: IntArray, topology: Topology) -> IntArray:
    if rows_LG.shape[1] == topology.num_ranks:
        return rows_LG
    rows_LR: IntArray = rows_LG.reshape(topology.num_layers, topology.num_ranks, -1).sum(axis=2)
    return rows_LR


def _both(amount_LGM: IntArray) -> IntArray:
    # many times faster than numpy's sum over an axis of two
    both_LG: IntArray = amount_LGM[..., TEXT] + amount_LGM[..., VISION]
    return both_LG


def _base_capacities(load: PassLoad, topology: Topology, capacity: Policy) -> list[int]:
    """Rows that every group of a layer may keep, one number a layer."""
    by_rank = capacity.level == Level.DEVICE
    num_groups = topology.num_ranks if by_rank else topology.num_experts
    num_rows_L = load.rows_L.tolist()
    base = {
        num: capacity_rows(capacity.capacity_factor, num, num_groups) for num in set(num_rows_L)
    }
    return [base[num] for num in num_rows_L]


def _macs_capacities(rows_LGM: IntArray, base_L: list[int], rho: float) -> IntArray:
    return np.stack(
        [_macs_layer(rows_GM, base, rho) for rows_GM, base in zip(rows_LGM, base_L, strict=True)]
    )


def _macs_layer(rows_GM: IntArray, base_rows: int, rho: float) -> IntArray:
    amount_M = (rows_GM * MACS_AMOUNTS_M).sum(axis=0)
    classes_G = expert_classes(rows_GM[:, VISION], rows_GM.sum(axis=1))
    base_amount = base_rows * AMOUNT_ONE
    return macs_capacity(base_amount, int(amount_M[VISION]), int(amount_M.sum()), classes_G, rho)


def _kept_plain(
    load: PassLoad, rows_LG: IntArray, capacity_LG: IntArray, topology: Topology, level: Level
) -> IntArray:
    """Rows that each group keeps; of which modality the others are makes no difference."""
    if load.num_protected_tokens == 0:
        return np.minimum(rows_LG, capacity_LG)
    protected_LG = _both(_protected(_groups(load, topology, level), load))
    return kept_amount(rows_LG - protected_LG, protected_LG, capacity_LG)


def _kept_macs(
    load: PassLoad, rows_LGM: IntArray, capacity_LG: IntArray, preference: Preference
) -> tuple[IntArray, IntArray]:
    """Amounts and rows that each group keeps."""
    amount_LGM = rows_LGM * MACS_AMOUNTS_M
    protected_LGM = _protected(amount_LGM, load)
    cuttable_LGM = amount_LGM - protected_LGM
    cuttable_LG, protected_LG = _both(cuttable_LGM), _both(protected_LGM)
    kept_LG = kept_amount(cuttable_LG, protected_LG, capacity_LG)
    cut_LG = cuttable_LG + protected_LG - kept_LG
    vision_LG = _cut_of_vision(cut_LG, cuttable_LGM, preference)
    text_rows_LG = -((vision_LG - cut_LG) // MACS_AMOUNTS_M[TEXT])
    vision_rows_LG = -(-vision_LG // MACS_AMOUNTS_M[VISION])
    rows_LG = _both(rows_LGM)
    cut_rows_LG = np.minimum(text_rows_LG + vision_rows_LG, rows_LG)
    return kept_LG, rows_LG - cut_rows_LG


def _protected(amount_LGM: IntArray, load: PassLoad) -> IntArray:
    # protected tokens have their share of each group
    return amount_LGM * load.num_protected_tokens // load.num_tokens


def _cut_of_vision(cut_LG: IntArray, cuttable_LGM: IntArray, preference: Preference) -> IntArray:
    text_LG, vision_LG = cuttable_LGM[..., TEXT], cuttable_LGM[..., VISION]
    if preference == Preference.IMAGE_FIRST:
        of_vision_LG = np.minimum(cut_LG, vision_LG)
    elif preference == Preference.TEXT_FIRST:
        of_vision_LG = np.maximum(cut_LG - text_LG, 0)
    else:
        of_vision_LG = cut_LG * vision_LG // np.maximum(text_LG + vision_LG, 1)
    return of_vision_LG


def _filled(load: PassLoad, room_LG: IntArray, topology: Topology, capacity: Policy) -> IntArray:
    """Rows that expansion adds on each rank, int64 [L, R].

    `room_LG` is in rows. Every expert with room takes rows of its own rank's tokens up to its
    capacity, each token at most once, and the rank at most `max_extra_experts` a token (0: no
    limit)::

        added_e = min(room_e, T_r)        device level: min(room_r, E_r * T_r)
        added_r = min(sum_e added_e, max_extra_experts * T_r)

    This assumes that local candidates abound: that few of the rank's tokens have the expert among
    their top-k already. Under MACS an added row is taken to weigh 1.0.
    """
    num_tokens_R = load.record.num_tokens_R
    groups_per_rank = room_LG.shape[1] // topology.num_ranks
    limit_R = num_tokens_R * (topology.experts_per_rank // groups_per_rank)
    added_LG = np.minimum(room_LG, np.repeat(limit_R, groups_per_rank))
    added_LR = _by_rank(added_LG, topology)
    if capacity.max_extra_experts > 0:
        added_LR = np.minimum(added_LR, num_tokens_R * capacity.max_extra_experts)
    return added_LR
