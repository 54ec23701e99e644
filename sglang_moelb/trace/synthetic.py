"""Synthetic traces: seeded loads of any size with the skew, the mix and the drift asked for.

Rows of the experts of a layer are the quantiles of a power law of density x ** -alpha between 1 and
0.8 times the tokens of a pass, as NVIDIA's aiconfigurator parametrises skew (it draws from that
law, which would make the skew itself random), each at most one row a token; alpha 0 stands for
equal shares. Which experts are hot follows a score a layer, modality and expert that drifts as a
stationary Gaussian walk, so hot spots move while the skew stays. Times are 0: not measured.

Shape letters: L MoE layers, R ranks, E logical experts, M modalities (text, vision).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sglang_moelb.config import Config
from sglang_moelb.trace.types import TracedPass, TraceError
from sglang_moelb.trace.writer import MAX_FILE_BYTES, TraceWriter
from sglang_moelb.types import FloatArray, IntArray, Policy, StepRecord, Topology

PASS_S = 0.1  # from one pass to the next
HOTTEST = 0.8  # of all tokens, at most, choose one expert
CONCENTRATION = 4.0  # of the beta distribution of a rank's share of vision tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticLoad:
    """What to synthesise.

    `tokens_per_rank` is the mean of a rank's tokens, which vary by up to half of it; `alpha` the
    exponent of the skew (0: none); `drift` in [0, 1] how fast hot spots move (0: never, 1: new ones
    every pass); `vision_share` and `protected_share` are means over ranks, the latter of text of
    requests that refuse lossy levers.
    """

    topology: Topology
    num_passes: int
    tokens_per_rank: int = 4096
    alpha: float = 1.01
    drift: float = 0.1
    vision_share: float = 0.5
    protected_share: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise `TraceError` for sizes or shares that no server can have."""
        sizes = self.topology
        _require(sizes.num_layers >= 1, "layers", sizes.num_layers, "at least 1")
        _require(sizes.num_ranks >= 1, "ranks", sizes.num_ranks, "at least 1")
        _require(
            sizes.num_experts >= 1 and sizes.num_experts % max(sizes.num_ranks, 1) == 0,
            "experts",
            sizes.num_experts,
            f"a multiple of the {sizes.num_ranks} ranks",
        )
        _require(
            1 <= sizes.topk <= sizes.num_experts, "topk", sizes.topk, f"1 to {sizes.num_experts}"
        )
        _require(self.num_passes >= 1, "passes", self.num_passes, "at least 1")
        _require(self.tokens_per_rank >= 1, "tokens", self.tokens_per_rank, "at least 1")
        _require(0 <= self.alpha <= 10, "alpha", self.alpha, "0 to 10")
        for name in ("drift", "vision_share", "protected_share"):
            share = getattr(self, name)
            _require(0 <= share <= 1, name.replace("_", "-"), share, "0 to 1")


def synthetic_passes(load: SyntheticLoad) -> Iterator[TracedPass]:
    """The passes of `load`; the same load gives the same passes."""
    rng = np.random.default_rng(load.seed)
    topology = load.topology
    score_LEM = rng.standard_normal((topology.num_layers, topology.num_experts, 2))
    keep = float(np.sqrt(1.0 - load.drift**2))
    for step in range(load.num_passes):
        yield _pass(load, step, _shares(score_LEM, load), rng)
        score_LEM = keep * score_LEM + load.drift * rng.standard_normal(score_LEM.shape)


def synthesise_trace(
    folder: Path, load: SyntheticLoad, max_file_bytes: int = MAX_FILE_BYTES
) -> None:
    """Write the trace of `load` to `folder`, as rank 0 of a server would. Raises `TraceError`."""
    source = f"synthetic, seed {load.seed}, alpha {load.alpha:g}, drift {load.drift:g}"
    writer = TraceWriter(
        folder,
        topology=load.topology,
        rank=0,
        config=Config(mode="observe"),
        source=source,
        max_file_bytes=max_file_bytes,
    )
    for traced in synthetic_passes(load):
        writer.add(traced)
        if writer.stopped:
            raise TraceError(f"{writer.stopped}: the trace ends before pass {traced.record.step}")
    writer.close()


def _require(holds: bool, name: str, value: float, fix: str) -> None:
    if not holds:
        raise TraceError(f"--{name} {value}: must be {fix}")


def _shares(score_LEM: FloatArray, load: SyntheticLoad) -> FloatArray:
    """Probability that a row goes to an expert, [L, E, M]; no token can choose one twice."""
    num_experts, topk = load.topology.num_experts, load.topology.topk
    share_E = _power_law(load)
    for _ in range(num_experts):
        over = share_E > 1.0 / topk + 1e-12
        if not over.any():
            break
        share_E[over] = 1.0 / topk
        rest = ~over & (share_E < 1.0 / topk)
        share_E[rest] *= (1.0 - share_E[~rest].sum()) / share_E[rest].sum()
    place_LEM = np.argsort(np.argsort(-score_LEM, axis=1), axis=1)
    shares_LEM: FloatArray = share_E[place_LEM]
    return shares_LEM


def _power_law(load: SyntheticLoad) -> FloatArray:
    """Shares of the experts, hottest first."""
    num_experts, num_ranks = load.topology.num_experts, load.topology.num_ranks
    quantile_E = (np.arange(num_experts, dtype=np.float64)[::-1] + 0.5) / num_experts
    largest = max(HOTTEST * load.tokens_per_rank * num_ranks, 2.0)
    power = 1.0 - load.alpha
    if load.alpha == 0.0:
        rows_E = np.ones(num_experts)
    elif abs(power) < 1e-9:
        rows_E = largest**quantile_E
    else:
        rows_E = (1.0 + quantile_E * (largest**power - 1.0)) ** (1.0 / power)
    share_E: FloatArray = rows_E / rows_E.sum()
    return share_E


def _pass(
    load: SyntheticLoad, step: int, share_LEM: FloatArray, rng: np.random.Generator
) -> TracedPass:
    topology = load.topology
    low, high = max(load.tokens_per_rank // 2, 1), load.tokens_per_rank * 3 // 2
    tokens_R = rng.integers(low, high, size=topology.num_ranks, endpoint=True)
    vision_R = _part(tokens_R, load.vision_share, rng)
    protected_R = np.minimum(_part(tokens_R, load.protected_share, rng), tokens_R - vision_R)
    rows_LREM = np.stack(
        [
            _rows(tokens_R - vision_R, share_LEM[..., 0], topology, rng),
            _rows(vision_R, share_LEM[..., 1], topology, rng),
        ],
        axis=-1,
    )
    rows_LEM = rows_LREM.sum(axis=1)
    num_layers, num_ranks = topology.num_layers, topology.num_ranks
    record = StepRecord(
        step=step,
        policy=Policy(epoch=0),
        phase="prefill",
        gate_reason="",
        rank=0,
        num_tokens_R=tokens_R,
        num_vision_tokens_R=vision_R,
        num_protected_tokens_R=protected_R,
        num_refused_tokens_R=protected_R,
        rows_LEM=rows_LEM,
        rows_after_LR=rows_LEM.reshape(num_layers, num_ranks, -1).sum(axis=2),
        routed_mass=float(tokens_R.sum() * num_layers),
        lost_mass=0.0,
        moved_mass=0.0,
        num_dropped_rows=0,
        num_added_rows=0,
        experts_ms_L=np.zeros(num_layers),
        layer_ms_L=np.zeros(num_layers),
        balance_ms=0.0,
        step_ms=0.0,
    )
    return TracedPass(record=record, rows_LREM=rows_LREM, now_s=PASS_S * step)


def _part(tokens_R: IntArray, share: float, rng: np.random.Generator) -> IntArray:
    """How many of each rank's tokens are of a kind whose mean share is `share`."""
    if share in (0.0, 1.0):
        return tokens_R * int(share)
    share_R = rng.beta(CONCENTRATION * share, CONCENTRATION * (1.0 - share), size=len(tokens_R))
    part_R: IntArray = np.rint(tokens_R * share_R).astype(np.int64)
    return part_R


def _rows(
    tokens_R: IntArray, share_LE: FloatArray, topology: Topology, rng: np.random.Generator
) -> IntArray:
    """Rows on each expert, [L, R, E]: top-k a token in all, at most one a token on an expert."""
    share_L1E = share_LE[:, None, :]
    limit_R1 = tokens_R[:, None]
    rows_LRE = rng.multinomial(np.tile(tokens_R * topology.topk, (len(share_LE), 1)), share_L1E)
    while True:
        over_LRE = np.maximum(rows_LRE - limit_R1, 0)
        over_LR = over_LRE.sum(axis=2)
        if not over_LR.any():
            return rows_LRE
        open_LRE = np.where(rows_LRE < limit_R1, share_L1E, 0.0)
        total_LR1 = np.maximum(open_LRE.sum(axis=2, keepdims=True), 1e-300)
        rows_LRE = rows_LRE - over_LRE + rng.multinomial(over_LR, open_LRE / total_LR1)
