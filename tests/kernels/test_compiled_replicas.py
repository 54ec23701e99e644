"""The plan and the reroute of replicas compile for Hopper in few variants, without a GPU.

The child process calls the ops on CPU tensors under `no_gpu_driver`, and prints what it found.
"""

from __future__ import annotations

import pytest

from tests.kernels.compiled import compiled

PROGRAM = """
import json
import torch
import no_gpu_driver
from sglang_moelb.kernels import row_layout
from sglang_moelb.kernels.place_replicas import kernel as place
from sglang_moelb.kernels.reroute import kernel as deal

E, R, S, K = 128, 4, 8, 8
rows_RW = torch.zeros(R, row_layout.row_width(E, with_histogram=False), dtype=torch.int32)
slots_RS = torch.full((R, S), -1, dtype=torch.int32)
quota_ER = torch.zeros(E, R, dtype=torch.int32)
for least in (1, 16, 256, 300):
    for send in (0, 1, 16):
        costs = {"min_rows": least, "send_rows": send, "receive_rows": send}
        place.place_replicas(rows_RW, num_experts=E, num_slots=S, **costs)
for num_tokens in (1, 16, 1000, 8192, 8193, 16384):
    for rank in (0, 1, 3):
        for dtype in (torch.int32, torch.int64):
            ids_TK = torch.zeros(num_tokens, K, dtype=dtype)
            deal.reroute(
                ids_TK, rows_RW, slots_RS, quota_ER, my_rank=rank, dtype=torch.int64
            )
jits = {"place": place._place, "prepare": deal._prepare, "apply": deal._apply}
for name, jit in jits.items():
    (cache,) = (caches[0] for caches in jit.device_caches.values())
    jits[name] = [variant.asm["ptx"] for variant in cache.values()]
print(json.dumps(jits))
"""


@pytest.fixture(scope="module")
def ptx() -> dict[str, list[str]]:
    """Every variant of each kernel that a few calls have compiled."""
    return compiled(PROGRAM)


def test_the_warm_up_meets_every_variant(ptx: dict[str, list[str]]) -> None:
    """A variant compiled in a live pass would make the other ranks wait."""
    assert {name: len(variants) for name, variants in ptx.items()} == {
        "place": 1,
        "prepare": 4,  # few or many tokens, ids of 32 or 64 bits
        "apply": 4,
    }

