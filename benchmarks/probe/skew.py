"""Routing skew of a probe by layer and modality at EP 2, 4 and 8: trained against untrained.

    python -m benchmarks.probe.skew --model FOLDER --out skew.json

A pass is a batch of test items in random order of tasks. The skew of a pass is the load of its
busiest rank over the mean of its ranks, experts lying on ranks in their order. Host or device.

Shape letters: B passes, L layers, E experts, R ranks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.probe.batches import exported, fixed_passes, placed, uploaded, ways_on
from benchmarks.probe.export import FACTS
from benchmarks.probe.model import Probe, Ways, draw

EP_SIZES = (2, 4, 8)
MODALITIES = ("text", "vision", "all")
FIRST_INDEX = 2_000_000  # items that no other evaluation uses


def rank_skew(loads: NDArray[Any], num_ranks: int) -> NDArray[np.float64]:
    """Busiest over mean rank load of loads [..., E]; one where nothing was routed.

    Example: loads (3, 1, 0, 0) on 2 ranks give 2.0. Raises ValueError when the experts do not
    divide.
    """
    num_experts = loads.shape[-1]
    if num_experts % num_ranks:
        raise ValueError(f"{num_experts} experts do not divide into {num_ranks} ranks")
    ranks = loads.reshape(*loads.shape[:-1], num_ranks, -1).sum(-1).astype(np.float64)
    mean = ranks.mean(-1)
    return np.where(mean > 0, ranks.max(-1) / np.where(mean > 0, mean, 1.0), 1.0)


@torch.no_grad()
def routed(
    probe: Probe, passes: Sequence[dict[str, NDArray[Any]]], device: torch.device, ways: Ways
) -> NDArray[np.float64]:
    """[B, L, 2, E] rows of text and vision tokens on each expert."""
    probe = placed(probe, device, ways)
    loads = []
    for arrays in passes:
        batch = uploaded(arrays, device, ways)
        loads.append(torch.stack(probe(batch.prompts, ways=ways)[1].loads).cpu())
    return torch.stack(loads).double().numpy()


def summarise(loads_BL2E: NDArray[np.float64]) -> list[dict[str, Any]]:
    """One row for each EP size, modality and layer: mean, 95th percentile and peak over passes."""
    by_modality = {
        "text": loads_BL2E[:, :, 0],
        "vision": loads_BL2E[:, :, 1],
        "all": loads_BL2E.sum(2),
    }
    rows = []
    for num_ranks in [r for r in EP_SIZES if loads_BL2E.shape[-1] % r == 0]:
        for modality, loads in by_modality.items():
            skew_BL = rank_skew(loads, num_ranks)
            for layer in range(skew_BL.shape[1]):
                of_layer = skew_BL[:, layer]
                rows.append(
                    {
                        "ep": num_ranks,
                        "modality": modality,
                        "layer": layer,
                        "mean": round(float(of_layer.mean()), 4),
                        "p95": round(float(np.percentile(of_layer, 95)), 4),
                        "peak": round(float(of_layer.max()), 4),
                    }
                )
    return rows


def compare(
    probe: Probe,
    seed: int,
    passes: Sequence[dict[str, NDArray[Any]]],
    device: torch.device,
    ways: Ways,
) -> dict[str, Any]:
    """Skew and expert shares of a trained probe and of its own start."""
    start = Probe(probe.sizes)
    draw(start, torch.Generator().manual_seed(seed))
    result: dict[str, Any] = {"passes": len(passes)}
    for name, each in (("trained", probe), ("untrained", start)):
        loads = routed(each, passes, device, ways)
        totals = loads.sum(0)
        shares = totals / np.maximum(totals.sum(-1, keepdims=True), 1.0)
        result[name] = {"skew": summarise(loads), "expert_share_L2E": shares.round(5).tolist()}
    return result


def table(result: dict[str, Any]) -> str:
    """The mean skew over passes, trained (untrained), one line for each EP size and modality."""
    lines = ["EP modality  busiest over mean rank load by layer: trained (untrained) | peak"]
    for num_ranks in EP_SIZES:
        for modality in MODALITIES:
            wanted = (num_ranks, modality)
            pairs = [
                [r for r in result[name]["skew"] if (r["ep"], r["modality"]) == wanted]
                for name in ("trained", "untrained")
            ]
            if not pairs[0]:
                continue
            cells = [f"{a['mean']:.2f} ({b['mean']:.2f})" for a, b in zip(*pairs, strict=True)]
            peak = max(a["peak"] for a in pairs[0])
            lines.append(f"{num_ranks:2d} {modality:8s}  {'  '.join(cells)} | {peak:.2f}")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True, help="an exported probe")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--items", type=int, default=100, help="items of each task")
    parser.add_argument("--pass-tokens", type=int, default=8192)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    probe = exported(args.model)
    seed = int(json.loads((args.model / FACTS).read_text()).get("seed", 0))
    passes = fixed_passes(FIRST_INDEX, args.items, args.pass_tokens, args.workers)
    device = torch.device(args.device)
    ways = ways_on(device)
    result = compare(probe, seed, passes, device, ways)
    args.out.write_text(json.dumps(result) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
