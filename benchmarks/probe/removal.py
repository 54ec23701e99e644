"""What each expert of the probe is worth: how much log-probability its removal costs.

    python -m benchmarks.probe.removal --model FOLDER --out importance.json

The exact measure of importance for `moelb calibrate --importance FILE`: one expert of one layer at
a time gives nothing, its tokens keep their other experts' weights, and the answers to the same test
items, teacher-forced, lose so much log-probability a token. Host or device.

Shape letters: L MoE layers, E experts.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from benchmarks.probe.batches import exported, fixed_batches, placed, ways_on
from benchmarks.probe.device import Batch
from benchmarks.probe.model import Probe, Ways
from benchmarks.probe.sweep import answer
from sglang_moelb.calibrate.importance import write_importance
from sglang_moelb.types import FloatArray

FIRST_INDEX = 5_000_000  # items that no evaluation uses


@contextmanager
def without(probe: Probe, layer: int, expert: int) -> Iterator[None]:
    """Within, the expert's output is zero."""
    down = probe.model.language_model.layers[layer].mlp.experts.down_proj
    with torch.no_grad():
        kept = down[expert].clone()
        down[expert].zero_()
        try:
            yield
        finally:
            down[expert].copy_(kept)


def removal_losses(probe: Probe, batches: Sequence[Batch], ways: Ways) -> FloatArray:
    """Mean loss of log-probability of an answer token without each expert, [L, E]."""
    sizes = probe.sizes
    plain = _logprob(probe, batches, ways)
    losses_LE = np.zeros((sizes.num_layers, sizes.num_experts))
    places = list(np.ndindex(losses_LE.shape))
    for layer, expert in track(places, description="experts"):
        with without(probe, layer, expert):
            losses_LE[layer, expert] = plain - _logprob(probe, batches, ways)
    return losses_LE


def _logprob(probe: Probe, batches: Sequence[Batch], ways: Ways) -> float:
    answers = [answer(probe, batch, ways, None)[0].logprob_A for batch in batches]
    return float(np.concatenate(answers).mean())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="an exported probe")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--items", type=int, default=190, help="over all tasks (default 190)")
    parser.add_argument("--pass-tokens", type=int, default=8192, help="tokens of a forward")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    ways = ways_on(device)
    probe = placed(exported(args.model), device, ways)
    batches = fixed_batches(
        FIRST_INDEX, args.items, args.pass_tokens, args.workers, device, ways
    )
    losses_LE = removal_losses(probe, batches, ways)
    num_items = sum(batch.num_items for batch in batches)
    measured = f"loss of log-probability without the expert, {num_items} items of the probe"
    write_importance(args.out, losses_LE, measure=measured, model=args.model.resolve().name)
    least, most = losses_LE.min(), losses_LE.max()
    print(f"{losses_LE.size} experts, worth {least:.4f} to {most:.4f}: {args.out}")


if __name__ == "__main__":
    main()
