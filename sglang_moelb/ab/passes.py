"""Balance, levers and reasons of an arm from the records of its passes.

Shape letters: L MoE layers, R EP ranks, P passes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from sglang_moelb.ab.result import Choice, LayerBalance, Passes, ReasonCount
from sglang_moelb.ab.types import ArmRun, Observed, PassRecord, Totals

NONE = "none"
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def measure_passes(run: ArmRun) -> Passes | None:
    """What the arm's passes did after the warm-up, or None for a server without the plugin."""
    observed = [session.observed for session in run.sessions if session.observed]
    if not observed:
        return None
    records = run.passes
    prefill = prefill_of(records)
    acted = [record for record in prefill if used_lever(record) != NONE]
    totals = _added([_difference(o.first.totals, o.last.totals) for o in observed])
    last = observed[-1].last
    return Passes(
        mode=last.mode,
        form=last.form,
        num_seen=len(records),
        num_passes=totals.num_passes,
        num_by_phase=dict(Counter(record.phase for record in records)),
        num_by_lever=totals.num_passes_by_lever,
        layers=layer_balances(prefill),
        balance_before=_mean_balance(prefill, "balance_before_L") or 1.0,
        balance_after=_mean_balance(prefill, "balance_after_L") or 1.0,
        balance_before_acted=_mean_balance(acted, "balance_before_L"),
        balance_after_acted=_mean_balance(acted, "balance_after_L"),
        busiest_before=_busiest(prefill, "rows_before_R"),
        busiest_after=_busiest(prefill, "rows_after_R"),
        vision_token_share=_share(
            sum(sum(r.num_vision_tokens_R) for r in prefill),
            sum(sum(r.num_tokens_R) for r in prefill),
        ),
        lost_share=_share(totals.lost_mass, totals.routed_mass),
        moved_share=_share(totals.moved_mass, totals.routed_mass),
        lost_share_prefill=_share(
            sum(r.lost_share * sum(r.rows_before_R) for r in prefill),
            sum(sum(r.rows_before_R) for r in prefill),
        ),
        num_dropped_rows=totals.num_dropped_rows,
        num_added_rows=totals.num_added_rows,
        overhead_share=_share(sum(r.balance_ms for r in records), sum(r.step_ms for r in records)),
        step_ms_by_phase=_step_ms(records),
        reasons=count_reasons(records),
        choices=list_choices(records),
        controller_states=list(dict.fromkeys(s for o in observed for s in o.controller_states)),
        last_decision=_last_decision(last.controller.get("last_decision") or {}),
        quality_budget=_quality_budget(observed[-1]),
        error="; ".join(o.error for o in observed if o.error),
    )


def prefill_of(records: Sequence[PassRecord]) -> list[PassRecord]:
    """The prefill passes that had tokens."""
    return [r for r in records if r.phase == "prefill" and sum(r.rows_before_R) > 0]


def used_lever(record: PassRecord) -> str:
    """The lever that acted in this pass: none where a gate held the policy's lever back."""
    return NONE if record.gate_reason else record.lever


def chosen_lever(record: PassRecord) -> str:
    """The lever that the policy of this pass named, whether it acted or not."""
    return record.policy_lever or record.lever


def layer_balances(records: Sequence[PassRecord]) -> list[LayerBalance]:
    """Mean and 95th percentile of max/mean of each layer, before and after the lever."""
    if not records:
        return []
    before_PL = np.array([record.balance_before_L for record in records])
    after_PL = np.array([record.balance_after_L for record in records])
    return [
        LayerBalance(
            layer=layer,
            before_mean=float(before_PL[:, layer].mean()),
            before_p95=float(np.percentile(before_PL[:, layer], 95)),
            after_mean=float(after_PL[:, layer].mean()),
            after_p95=float(np.percentile(after_PL[:, layer], 95)),
        )
        for layer in range(before_PL.shape[1])
    ]


def count_reasons(records: Sequence[PassRecord]) -> list[ReasonCount]:
    """Passes by lever and reason, the most frequent first; reasons that differ in numbers are one.

    Where a gate held the lever back, its reason counts.
    """
    counts: Counter[tuple[str, bool, str]] = Counter()
    examples: dict[tuple[str, bool, str], str] = {}
    for record in records:
        text = record.gate_reason or record.reason or "no reason given"
        key = (chosen_lever(record), not record.gate_reason, _NUMBER.sub("#", text))
        counts[key] += 1
        examples[key] = text
    return [
        ReasonCount(lever=key[0], used=key[1], reason=key[2], num_passes=n, example=examples[key])
        for key, n in counts.most_common()
    ]


def list_choices(records: Sequence[PassRecord]) -> list[Choice]:
    """The policies in the order in which they came into force, from their epochs."""
    choices: list[Choice] = []
    for record in records:
        if not choices or choices[-1].epoch != record.epoch:
            choices.append(
                Choice(
                    step=record.step,
                    epoch=record.epoch,
                    lever=chosen_lever(record),
                    reason=record.reason or "no reason given",
                )
            )
    return choices


def _mean_balance(records: Sequence[PassRecord], name: str) -> float | None:
    values = [value for record in records for value in getattr(record, name)]
    return float(np.mean(values)) if values else None


def _busiest(records: Sequence[PassRecord], name: str) -> float:
    busiest = sum(max(getattr(record, name)) for record in records)
    mean = sum(float(np.mean(record.rows_before_R)) for record in records)
    return busiest / mean if mean else 1.0


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _step_ms(records: Sequence[PassRecord]) -> dict[str, float]:
    phases = sorted({record.phase for record in records})
    return {
        phase: float(np.median([r.step_ms for r in records if r.phase == phase]))
        for phase in phases
    }


def _last_decision(decision: dict[str, Any]) -> dict[str, str]:
    return {
        name.replace("_", " "): f"{value:.3g}" if isinstance(value, float) else str(value)
        for name, value in decision.items()
    }


def _quality_budget(observed: Observed) -> float | None:
    value = observed.last.config.get("controller", {}).get("quality_budget")
    return float(value) if isinstance(value, int | float) else None


def _difference(first: Totals, last: Totals) -> Totals:
    counts = {
        name: number - first.num_passes_by_lever.get(name, 0)
        for name, number in last.num_passes_by_lever.items()
    }
    return Totals(
        num_passes=last.num_passes - first.num_passes,
        num_prefill_passes=last.num_prefill_passes - first.num_prefill_passes,
        num_passes_by_lever=counts,
        routed_mass=last.routed_mass - first.routed_mass,
        lost_mass=last.lost_mass - first.lost_mass,
        moved_mass=last.moved_mass - first.moved_mass,
        num_dropped_rows=last.num_dropped_rows - first.num_dropped_rows,
        num_added_rows=last.num_added_rows - first.num_added_rows,
    )


def _added(parts: Sequence[Totals]) -> Totals:
    levers: Counter[str] = Counter()
    for part in parts:
        levers.update(part.num_passes_by_lever)
    return Totals(
        num_passes=sum(p.num_passes for p in parts),
        num_prefill_passes=sum(p.num_prefill_passes for p in parts),
        num_passes_by_lever=dict(levers),
        routed_mass=sum(p.routed_mass for p in parts),
        lost_mass=sum(p.lost_mass for p in parts),
        moved_mass=sum(p.moved_mass for p in parts),
        num_dropped_rows=sum(p.num_dropped_rows for p in parts),
        num_added_rows=sum(p.num_added_rows for p in parts),
    )
