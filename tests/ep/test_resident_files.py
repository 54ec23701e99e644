"""Laws of placement files that ranks read for themselves: all go on with one file, or all end."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from sglang_moelb.config import Config, merge
from sglang_moelb.ep.resident import attach
from sglang_moelb.placement import (
    SCHEMA,
    VERSION,
    ExpertBytes,
    LayerPlacement,
    Placement,
    RankMemory,
    Sizes,
    memory_of,
)
from sglang_moelb.types import Topology

from .ranks import Ranks

pytestmark = pytest.mark.dist

TOPOLOGY = Topology(num_layers=1, num_experts=8, num_ranks=2, topk=2)


def placement(topk: int) -> bytes:
    layers, expert_bytes = (LayerPlacement(),), ExpertBytes(high=4000, low=2001)
    before, after = memory_of(layers, TOPOLOGY, expert_bytes)
    return Placement(
        schema=SCHEMA, version=VERSION, format="fp8",
        sizes=Sizes(num_layers=1, num_experts=8, num_ranks=2, topk=topk),
        expert_bytes=expert_bytes, layers=layers, memory=RankMemory(before=before, after=after),
    ).to_json()  # fmt: skip


def end_of_start(group: dist.ProcessGroup, rank: int, path: str) -> str:
    """What a rank that reads the placement at `path` ends with."""
    kept = attach.low.expert_layers
    attach.low.expert_layers = lambda model: []
    config = merge(Config(), {"resident": {"placement": path}})
    groups = SimpleNamespace(cpu_group=group, device_group=None)
    try:
        attach.attach_resident(SimpleNamespace(model=None), config, TOPOLOGY, rank, groups)
    except SystemExit as ended:
        return str(ended)
    finally:
        attach.low.expert_layers = kept
    return ""


@pytest.mark.parametrize(
    ("other", "told_there"),
    [(placement(topk=3), "ranks have read different files"), (None, "cannot be read")],
    ids=["of another model", "missing"],
)
def test_a_rank_with_another_file_ends_all_ranks_and_none_waits(
    ranks: Ranks, tmp_path: Path, other: bytes | None, told_there: str
) -> None:
    mine, theirs = tmp_path / "mine.json", tmp_path / "theirs.json"
    mine.write_bytes(placement(topk=2))
    if other is not None:
        theirs.write_bytes(other)
    told = ranks.run(end_of_start, [str(mine), str(theirs)])
    assert "ranks have read different files" in told[0]
    assert told_there in told[1]
