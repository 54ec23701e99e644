"""What tracing a pass costs: bytes, time to encode and write, and time to hand it over.

    python -m benchmarks.bench_trace [--folder DIR] [--repeats 30]

Goals: at most 2 KB a layer and pass at 128 experts and 4 ranks, and a hand-over that a serving
thread does not feel. Encoding and writing are done by a thread of their own. Passes are synthetic:
power law, two modalities. Prints medians with p10 and p90; times are CPU time of the thread, and
for writing wall time too, which has the disk in it.

Shape letters: L MoE layers, T rows of one rank, K top-k, E logical experts.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from time import perf_counter, thread_time

import numpy as np
import torch

from sglang_moelb.config import Config
from sglang_moelb.ep.agreed import Agreed, Sizes
from sglang_moelb.ep.clock import HostMark
from sglang_moelb.ep.records import PassLog
from sglang_moelb.ep.token_trace import TokenTrace
from sglang_moelb.trace.background import BackgroundWriter
from sglang_moelb.trace.synthetic import SyntheticLoad, synthetic_passes
from sglang_moelb.trace.tokens import TokenWriter
from sglang_moelb.trace.types import TraceStats
from sglang_moelb.trace.writer import TraceWriter
from sglang_moelb.types import Lever, Policy, Topology

NUM_LAYERS, NUM_EXPERTS, TOPK = 48, 128, 8


def told(name: str, values: list[float], unit: str) -> str:
    """Median with p10 and p90."""
    low, middle, high = np.percentile(values, [10, 50, 90])
    return f"{name} {middle:.3g} {unit} ({low:.3g} to {high:.3g})"


def passes(folder: Path, num_ranks: int, tokens: int, repeats: int) -> str:
    """Bytes and times of the trace of passes."""
    topology = Topology(
        num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS, num_ranks=num_ranks, topk=TOPK
    )
    load = SyntheticLoad(topology=topology, num_passes=repeats, tokens_per_rank=tokens)
    writer = TraceWriter(folder / "p", topology=topology, rank=0, config=Config())
    background = BackgroundWriter(
        TraceWriter(folder / "b", topology=topology, rank=0, config=Config())
    )
    cpu_ms, wall_ms, layer_bytes, hand_us = [], [], [], []
    for traced in synthetic_passes(load):
        before, begun_cpu, begun = writer.num_bytes, thread_time(), perf_counter()
        writer.add(traced)
        wall_ms.append(1e3 * (perf_counter() - begun))
        cpu_ms.append(1e3 * (thread_time() - begun_cpu))
        layer_bytes.append((writer.num_bytes - before) / NUM_LAYERS)
        begun_cpu = thread_time()
        background.add(traced)
        hand_us.append(1e6 * (thread_time() - begun_cpu))
    background.close()
    figures = [
        told("", layer_bytes, "bytes a layer"),
        told("encode and write", cpu_ms, "ms CPU"),
        told("", wall_ms, "ms wall"),
        told("hand over", hand_us, "us CPU"),
    ]
    return f"{num_ranks} ranks of {tokens} tokens: " + ", ".join(figures)


def tokens_of(folder: Path, num_rows: int, repeats: int) -> str:
    """Bytes and times of the trace of tokens of one rank."""
    topology = Topology(num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS, num_ranks=4, topk=TOPK)
    writer = TokenWriter(folder / "t", topology=topology, rank=0, config=Config(), every=1)
    trace = TokenTrace(writer, 1, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    scores_LTE = torch.rand(NUM_LAYERS, num_rows, NUM_EXPERTS, generator=generator)
    scores_LTE *= torch.linspace(0.2, 1.0, NUM_EXPERTS)
    weights_LTK, ids_LTK = scores_LTE.topk(TOPK)
    del scores_LTE
    routed_L = list(zip(ids_LTK.int(), weights_LTK.softmax(dim=2), strict=True))
    hand_ms, wall_ms = [], []
    flags_T = (torch.arange(num_rows) % 2).to(torch.uint8)
    for _ in range(repeats):
        log = _log(num_rows)
        log.tokens_L = routed_L
        before, begun_cpu, begun = trace.stats, thread_time(), perf_counter()
        trace.add(log, flags_T)
        hand_ms.append(1e3 * (thread_time() - begun_cpu))
        while trace.stats == before:
            _wait(trace.stats)
        wall_ms.append(1e3 * (perf_counter() - begun))
    num_bytes = trace.stats.num_bytes / repeats / (NUM_LAYERS * num_rows * TOPK)
    trace.close()
    figures = [
        f"{num_bytes:.2f} bytes a token, layer and chosen expert",
        told("hand over", hand_ms, "ms CPU (copies of the host)"),
        told("until written", wall_ms, "ms wall"),
    ]
    return f"tokens, {num_rows} rows of a rank: " + ", ".join(figures)


def _log(num_rows: int) -> PassLog:
    sizes = Sizes(num_tokens=num_rows, num_prefill_tokens=num_rows, phase="prefill")
    agreed = Agreed(policy=Policy(epoch=0), sizes_R=(sizes,))
    return PassLog(
        step=0,
        agreed=agreed,
        lever=Lever.NONE,
        gate_reason="",
        begun=HostMark(),
        timed=False,
        flags_T=None,
    )


def _wait(stats: TraceStats) -> None:
    """Let the writer's thread have the interpreter."""
    torch.ones(1000).sum()
    assert replace(stats).state == "running"


def main() -> None:
    """Print one line a figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: a new one)")
    parser.add_argument("--repeats", type=int, default=30)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as made:
        for num_ranks, tokens in ((4, 1024), (4, 16384), (64, 1024), (64, 16384)):
            folder = Path(made) / f"{num_ranks}-{tokens}"
            print(passes(folder, num_ranks, tokens, given.repeats))
        for num_rows in (1024, 8192):
            print(tokens_of(Path(made) / str(num_rows), num_rows, max(given.repeats // 3, 3)))


if __name__ == "__main__":
    main()
