"""The arms of a replay by name: our levers, our controller, and peers' rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from sglang_moelb.config import Config, ReplicateConfig
from sglang_moelb.replay import exact, lossy
from sglang_moelb.replay.controlled import Auto
from sglang_moelb.replay.cost import Machine
from sglang_moelb.replay.history import Eplb
from sglang_moelb.replay.replicas import replicate
from sglang_moelb.replay.types import ReplayError, Rule
from sglang_moelb.types import Lever, Topology


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Parameters of the arms; `factor` is the capacity of the lossy ones, in mean rows."""

    config: Config
    topology: Topology  # of the replay, not of the trace
    machine: Machine
    factor: float = 1.25
    eplb_window: int = 100
    eplb_interval: int = 100
    eplb_redundant: int = 8
    min_rows: int = ReplicateConfig().min_rows
    num_slots: int = ReplicateConfig().slots


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """What an arm is, for people, and how its rule is made."""

    title: str
    exact: bool
    make: Callable[[Options], Rule]


def _eplb(options: Options) -> Rule:
    return Eplb(
        window=options.eplb_window,
        interval=options.eplb_interval,
        num_redundant=options.eplb_redundant,
    )


ARMS: dict[str, Arm] = {
    "none": Arm(title="no balancing", exact=True, make=lambda o: exact.none),
    "auto": Arm(
        title="our controller, in the loop",
        exact=False,
        make=lambda o: Auto(o.config, o.topology, o.machine),
    ),
    "drop": Arm(
        title="our drop, device level, all ranks",
        exact=False,
        make=lambda o: partial(lossy.capacity, lever=Lever.DROP, factor=o.factor),
    ),
    "expand": Arm(
        title="our expand (fill), device level, all ranks",
        exact=False,
        make=lambda o: partial(lossy.capacity, lever=Lever.EXPAND, factor=o.factor),
    ),
    "replicate": Arm(
        title="our real-time replicas",
        exact=True,
        make=lambda o: partial(replicate, min_rows=o.min_rows, num_slots=o.num_slots),
    ),
    "eplb": Arm(title="EPLB, by past passes", exact=True, make=_eplb),
    "llep": Arm(
        title="LLEP", exact=True, make=lambda o: partial(exact.llep, min_rows=o.min_rows)
    ),
    "ultraep": Arm(
        title="UltraEP's quota rule",
        exact=True,
        make=lambda o: partial(exact.ultraep, min_rows=o.min_rows, num_slots=o.num_slots),
    ),
    "realb": Arm(title="ReaLB (low precision)", exact=False, make=lambda o: lossy.realb),
    "capacity-drop": Arm(
        title="Capacity-Aware Token Drop",
        exact=False,
        make=lambda o: partial(lossy.capacity_aware, factor=o.factor),
    ),
    "capacity-expand": Arm(
        title="Capacity-Aware Expanded Drop",
        exact=False,
        make=lambda o: partial(lossy.capacity_aware, factor=o.factor, expanded=True),
    ),
    "macs": Arm(title="MACS", exact=False, make=lambda o: partial(lossy.macs, factor=o.factor)),
    "ideal": Arm(title="perfect balance (bound)", exact=True, make=lambda o: exact.ideal),
}
BASIC = ("none", "auto", "drop", "expand", "eplb", "ideal")


def chosen(names: str) -> tuple[str, ...]:
    """The arms that `--arms` names, `none` first; "basic" and "all" stand for several.

    Raises `ReplayError` for one that there is not.
    """
    groups = {"basic": BASIC, "all": tuple(ARMS)}
    given = [name.strip() for name in names.split(",") if name.strip()]
    found = [arm for name in given for arm in groups.get(name, (name,))]
    for name in found:
        if name not in ARMS:
            raise ReplayError(
                f"--arms {name}: no such arm. Use basic, all, or some of {', '.join(ARMS)}."
            )
    return tuple(dict.fromkeys(("none", *found)))
