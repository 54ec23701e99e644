"""What the replica planner leaves of skewed routings, beside the simulator's UltraEP and LLEP.

    python benchmarks/sim_replicas.py --out DIR

Writes rows.jsonl, table.md (a line for each size and number of slots, worst of all routings) and
replicas.png. 8,192 tokens a rank, top-8, copies of 256 rows at least, five seeds a routing. Runs on
the host, about two minutes. UltraEP and LLEP are `sglang_moelb.replay.exact`, our reading of their
rules; LLEP knows no slots and does nothing below a skew of 1.3.

Shape letters: R ranks, E experts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from replica_routings import TOPK, RoutingCase, expert_rows

from sglang_moelb.ab.theme import LIGHT, SERIES, render
from sglang_moelb.controller.place_replicas import CopyCosts, place_replicas
from sglang_moelb.replay import exact
from sglang_moelb.replay.types import Counts
from sglang_moelb.types import IntArray

NUM_TOKENS, MIN_ROWS, NUM_SEEDS = 8192, 256, 5
SIZES = tuple(product((4, 8, 32, 64), (128, 256)))
SLOTS = (4, 8)
FEW_RANKS = ((4, 256, 12), (4, 256, 16))  # whose many experts need more slots than others
CASES = sorted((*((*size, num_slots) for size, num_slots in product(SIZES, SLOTS)), *FEW_RANKS))
KINDS = (
    *(("rank", skew) for skew in (1.5, 2.0, 3.0, 4.0)),
    *(("expert", share) for share in (0.05, 0.15, 0.3)),
    *(("zipf", alpha) for alpha in (0.5, 0.8, 1.2)),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Rows of the busiest rank over the mean; the worst of the seeds. Copies of ours a rank."""

    num_ranks: int
    num_experts: int
    num_slots: int
    routing: str
    before: float
    ours: float
    ultraep: float
    llep: float
    mean_copies: float
    max_copies: int


def simulate(case: RoutingCase, num_slots: int) -> Row:
    """One routing under all rules."""
    drawn = [expert_rows(case, NUM_TOKENS, seed) for seed in range(NUM_SEEDS)]
    costs = CopyCosts(min_rows=MIN_ROWS)
    plans = [place_replicas(rows_RE, num_slots=num_slots, costs=costs) for rows_RE in drawn]
    copies = np.array([(plan.slots_RS >= 0).sum(axis=1) for plan in plans])
    counts = passes(drawn)
    return Row(
        num_ranks=case.num_ranks,
        num_experts=case.num_experts,
        num_slots=num_slots,
        routing=case.name,
        before=worst(counts.rows_PLR),
        ours=worst(np.array([[plan.rows_R] for plan in plans])),
        ultraep=worst(exact.ultraep(counts, min_rows=MIN_ROWS, num_slots=num_slots).rows_PLR),
        llep=worst(exact.llep(counts, min_rows=MIN_ROWS).rows_PLR),
        mean_copies=float(copies.mean()),
        max_copies=int(copies.max()),
    )


def passes(drawn: list[IntArray]) -> Counts:
    """Each draw as a pass of one layer, as the simulator's rules take them."""
    rows_PLSEM = np.stack([np.stack([rows_RE, 0 * rows_RE], axis=-1)[None] for rows_RE in drawn])
    num_ranks = len(drawn[0])
    return Counts(
        rows_PLSEM=rows_PLSEM,
        rows_PLEM=rows_PLSEM.sum(axis=2),
        num_tokens_PS=np.full((len(drawn), num_ranks), NUM_TOKENS),
        num_protected_P=np.zeros(len(drawn), dtype=np.int64),
        num_refused_P=np.zeros(len(drawn), dtype=np.int64),
        num_ranks=num_ranks,
        topk=TOPK,
    )


def worst(rows_PLR: IntArray) -> float:
    """Largest max/mean of the ranks' rows."""
    return float((rows_PLR.max(axis=2) / rows_PLR.mean(axis=2)).max())


def all_rows() -> Iterator[Row]:
    """Every size, number of slots and routing."""
    for num_ranks, num_experts, num_slots in CASES:
        for kind, strength in KINDS:
            case = RoutingCase(
                kind=kind,
                strength=min(strength, num_ranks) if kind == "rank" else strength,
                num_ranks=num_ranks,
                num_experts=num_experts,
            )
            yield simulate(case, num_slots)


def table(rows: list[Row]) -> str:
    """The worst routing of each size and number of slots, as Markdown."""
    lines = [
        "| ranks, experts | slots | before | ours | UltraEP's rule | LLEP's rule | copies a rank |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for size in CASES:
        num_ranks, num_experts, num_slots = size
        of_size = [r for r in rows if (r.num_ranks, r.num_experts, r.num_slots) == size]
        befores = [row.before for row in of_size]
        most = max(row.mean_copies for row in of_size)
        lines.append(
            f"| {num_ranks}, {num_experts} | {num_slots} | {min(befores):.2f} to {max(befores):.2f}"
            f" | {max(row.ours for row in of_size):.3f} | {max(row.ultraep for row in of_size):.3f}"
            f" | {max(row.llep for row in of_size):.3f} | {most:.1f}, at most"
            f" {max(row.max_copies for row in of_size)} |"
        )
    return "\n".join(lines) + "\n"


def draw(figure: Figure) -> None:
    """What is left over rank skew, at 4 ranks with 4 and 8 slots and at 64."""
    for axes, (num_ranks, num_experts, num_slots) in zip(
        figure.subplots(1, 3, sharey=True),
        ((4, 128, 4), (4, 128, 8), (64, 256, 8)),
        strict=True,
    ):
        skews = np.arange(1.0, 4.01, 0.25)
        sizes = {"num_ranks": num_ranks, "num_experts": num_experts}
        rows = [
            simulate(RoutingCase(kind="rank", strength=float(skew), **sizes), num_slots)
            for skew in skews
        ]
        for at, (name, label) in enumerate(
            (("ours", "ours"), ("ultraep", "UltraEP's rule"), ("llep", "LLEP's rule, no slots"))
        ):
            values = [getattr(row, name) for row in rows]
            axes.plot(skews, values, color=SERIES[at], lw=1.6, marker=".", ms=4, label=label)
        axes.set(xlabel="rank skew before", title=f"{num_ranks} ranks, {num_slots} slots")
    figure.axes[0].set_ylabel("skew left")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)


def main() -> None:
    """Simulate, then write rows, table and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    rows = list(all_rows())
    (out / "rows.jsonl").write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    (out / "table.md").write_text(table(rows))
    (out / "replicas.png").write_bytes(render(LIGHT, 3.2, draw))
    print(table(rows))


if __name__ == "__main__":
    main()
