r"""A made-up placement for servers of benchmarks: as many bytes as one of real traffic, no traffic.

    python3 -m benchmarks.gpu.make_placement --model DIR --ranks 2 --slots 4 --format fp8 \
        --out placement.json

Which experts are hot, and how important each is, is drawn at random; sizes are of DIR/config.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from sglang_moelb.controller.place_resident import ResidentLimits, place_resident
from sglang_moelb.placement import (
    SCHEMA,
    VERSION,
    ExpertBytes,
    Placement,
    RankMemory,
    Sizes,
    memory_of,
)
from sglang_moelb.stored_formats import LOW_BYTES


def made_up(model: Path, num_ranks: int, num_slots: int, low_format: str) -> Placement:
    """The placement of a Qwen3 MoE model."""
    config = json.loads((model / "config.json").read_text())
    sizes = Sizes(
        num_layers=config["num_hidden_layers"],
        num_experts=config["num_experts"],
        num_ranks=num_ranks,
        topk=config["num_experts_per_tok"],
    )
    num_weights = 3 * config["hidden_size"] * config["moe_intermediate_size"]
    expert_bytes = ExpertBytes(high=2 * num_weights, low=LOW_BYTES[low_format](num_weights))
    drawn = np.random.default_rng(0)
    shape = (sizes.num_layers, sizes.num_experts)
    limits = ResidentLimits(expert_bytes=expert_bytes, num_slots=num_slots)
    layers = place_resident(drawn.integers(1, 999, shape), drawn.random(shape), sizes.topology,
                            limits)  # fmt: skip
    before, after = memory_of(layers, sizes.topology, expert_bytes)
    return Placement(
        schema=SCHEMA,
        version=VERSION,
        format=low_format,
        sizes=sizes,
        expert_bytes=expert_bytes,
        layers=layers,
        memory=RankMemory(before=before, after=after),
    )


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--format", choices=tuple(LOW_BYTES), default="fp8")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.write_bytes(made_up(args.model, args.ranks, args.slots, args.format).to_json())


if __name__ == "__main__":
    main()
