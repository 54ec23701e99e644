"""status -> Live: what a viewer needs of `/moelb/status`, rounded. Pure; in the HTTP process.

Shape letters: L MoE layers, R ranks.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from sglang_moelb.live.heat import Heat
from sglang_moelb.live.wire import VERSION, History, Live, Pass, Stretch

NUM_STRETCHES = 8
NUM_HISTORY = 48
MAX_TEXT = 400


def live_of(status: dict[str, Any]) -> Live:
    """The compact form of a status; fields that the status lacks keep their defaults."""
    if not status.get("active"):
        return Live(moelb_live=VERSION, active=False, reason=_text(status.get("reason", "")))
    policy, controller = status.get("policy", {}), status.get("controller", {})
    topology, limits = status.get("topology", {}), status.get("config", {}).get("controller", {})
    totals, decision = status.get("totals", {}), controller.get("last_decision", {})
    recent = status.get("recent", [])
    heat = msgspec.convert(status["heat"], Heat) if status.get("heat") else None
    shown = _shown(recent, heat)
    return Live(
        moelb_live=VERSION,
        form=status.get("form", ""),
        mode=status.get("mode", ""),
        num_layers=topology.get("num_layers", 0),
        num_experts=topology.get("num_experts", 0),
        num_ranks=topology.get("num_ranks", 0),
        num_ranks_answering=status.get("ranks_answering", 0),
        lever=policy.get("lever", "none"),
        epoch=policy.get("epoch", 0),
        capacity=_capacity(policy),
        policy_reason=_text(policy.get("reason", "")),
        controller=controller.get("state", ""),
        trace=_text(controller.get("trace", "off")),
        decision=_text(decision.get("reason", "")),
        expected_gain=_number(decision.get("expected_gain"), 4),
        num_passes=status.get("num_passes", 0),
        num_prefill_passes=totals.get("num_prefill_passes", 0),
        num_passes_by_lever=totals.get("num_passes_by_lever", {}),
        spent_share=_number(decision.get("spent_mass_share"), 5),
        quality_budget=limits.get("quality_budget", 0.0),
        quality_window_passes=limits.get("quality_window_passes", 0),
        last=_pass(shown) if shown else None,
        heat=heat if shown and heat and heat.step == shown["step"] else None,
        decisions=_stretches(recent),
        history=_history(recent[-NUM_HISTORY:]) if recent else None,
        memory=_memory(status.get("memory")),
        verdict=_text((status.get("verdict") or {}).get("text", "")),
    )


def _shown(recent: list[dict[str, Any]], heat: Heat | None) -> dict[str, Any] | None:
    """The pass of the map, which the server has chosen; the last one where there is no map."""
    of_heat = [row for row in recent if heat and row["step"] == heat.step]
    found = of_heat or recent
    return found[-1] if found else None


def _pass(row: dict[str, Any]) -> Pass:
    return Pass(
        step=row["step"],
        lever=row["lever"],
        gate_reason=_text(row["gate_reason"]),
        num_tokens_R=row["num_tokens_R"],
        num_vision_tokens=sum(row["num_vision_tokens_R"]),
        num_protected_tokens=sum(row["num_protected_tokens_R"]),
        balance_before_L=[round(x, 2) for x in row["balance_before_L"]],
        balance_after_L=[round(x, 2) for x in row["balance_after_L"]],
        rows_before_R=[int(x) for x in row["rows_before_R"]],
        rows_after_R=[int(x) for x in row["rows_after_R"]],
        lost_share=_number(row["lost_share"], 5) or 0.0,
        moved_share=_number(row["moved_share"], 5) or 0.0,
        step_ms=row["step_ms"],
        experts_ms=row["experts_ms"],
        layer_ms=row["layer_ms"],
        balance_ms=row["balance_ms"],
    )


def _stretches(recent: list[dict[str, Any]]) -> list[Stretch]:
    """The last changes of the lever, oldest first."""
    runs: list[list[dict[str, Any]]] = []
    for row in recent:
        if runs and runs[-1][-1]["policy_lever"] == row["policy_lever"]:
            runs[-1].append(row)
        else:
            runs.append([row])
    return [
        Stretch(
            first_step=run[0]["step"],
            last_step=run[-1]["step"],
            num_passes=len(run),
            num_gated=sum(bool(row["gate_reason"]) for row in run),
            lever=run[-1]["policy_lever"],
            reason=_text(run[-1]["reason"]),
        )
        for run in runs[-NUM_STRETCHES:]
    ]


def _history(rows: list[dict[str, Any]]) -> History:
    return History(
        step=[row["step"] for row in rows],
        num_tokens=[sum(row["num_tokens_R"]) for row in rows],
        lever=[row["lever"] for row in rows],
        balance_before=[_mean(row["balance_before_L"]) for row in rows],
        balance_after=[_mean(row["balance_after_L"]) for row in rows],
        step_ms=[round(row["step_ms"], 2) for row in rows],
        balance_ms=[round(row["balance_ms"], 2) for row in rows],
    )


def _mean(values_L: list[float]) -> float:
    return round(math.fsum(values_L) / len(values_L), 2) if values_L else 1.0


def _capacity(policy: dict[str, Any]) -> str:
    if "capacity_factor" not in policy:
        return ""
    return f"{policy['capacity_factor']:g} x mean a {policy.get('level', 'device')}"


def _memory(ledger: Any) -> dict[str, float]:
    """The numbers of a memory ledger by name; nothing where the status has none."""
    if not isinstance(ledger, dict):
        return {}
    return {str(k): v for k, v in ledger.items() if isinstance(v, int | float)}


def _number(value: float | None, digits: int) -> float | None:
    return round(value, digits) if value is not None and math.isfinite(value) else None


def _text(value: object) -> str:
    text = str(value)
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"
