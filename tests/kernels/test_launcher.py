"""A kernel that is launched again gets what Triton's own launch would give it.

The child process calls the ops on CPU tensors under `no_gpu_driver`, whose launcher writes down
what it is asked to launch.
"""

from __future__ import annotations

import pytest

from tests.kernels.compiled import compiled

PROGRAM = """
import json
import torch
import no_gpu_driver
from triton.runtime.driver import driver
from sglang_moelb.kernels import row_layout
from sglang_moelb.kernels.convert_fp8 import kernel as convert
from sglang_moelb.kernels.count_experts import kernel as count
from sglang_moelb.kernels.cut_tokens import kernel as cut
from sglang_moelb.kernels.keys import KeyRule
from sglang_moelb.kernels.place_replicas import kernel as place
from sglang_moelb.kernels.plan_cuts import kernel as plan
from sglang_moelb.kernels.plan_downgrade import kernel as lower
from sglang_moelb.kernels.pull_experts import kernel as pull
from sglang_moelb.kernels.quantise_rows import kernel as quantise
from sglang_moelb.kernels.reroute import kernel as deal

launched = []

def told(argument):
    is_tensor = hasattr(argument, "dtype")
    return f"{argument.dtype} {argument.data_ptr() % 16}" if is_tensor else argument

def launcher_cls(source, metadata):
    def launch(x, y, z, stream, function, packed, data, enter, leave, *args):
        shown = [
            [told(one) for one in a] if type(a) is tuple else told(a) for a in args
        ]
        compiled_for = f"{source.signature} {source.attrs} {metadata.num_warps} warps"
        launched.append([source.name, compiled_for, [x, y, z], shown])
    return launch

driver.active.launcher_cls = launcher_cls
E, R, S, K = 128, 4, 8, 8
rows_RW = torch.zeros(R, row_layout.row_width(E, with_histogram=False), dtype=torch.int32)
slots_RS = torch.full((R, S), -1, dtype=torch.int32)
quota_ER = torch.zeros(E, R, dtype=torch.int32)
experts_PR = [[torch.zeros(32, width).bfloat16()] * R for width in (256, 128)]
staged_P = [torch.zeros(S, width).bfloat16() for width in (256, 128)]
RULE = KeyRule(metric=0, preference=0, seed=3)
width = row_layout.row_width(E, with_histogram=True)
histograms_RW = torch.zeros(R, width, dtype=torch.int32)
capacity_G = torch.zeros(E, dtype=torch.int64)
WEIGHTS = [torch.zeros(4, rows, 256).bfloat16() for rows in (512, 256)]
LOW = [torch.zeros(weight.shape, dtype=torch.float8_e4m3fn) for weight in WEIGHTS]
SCALES = [torch.zeros(4, len(weight[0]) // 128, 2) for weight in WEIGHTS]
low_E = torch.zeros(E, dtype=torch.int32)

def run(num_tokens, start, dtype):
    ids_TK = torch.zeros(num_tokens, K, dtype=dtype)
    flags_T = torch.zeros(num_tokens + 32, dtype=torch.uint8)[start : start + num_tokens]
    count.count_layers(ids_TK[None], flags_T, num_experts=E)
    place.place_replicas(rows_RW, num_experts=E, num_slots=S, min_rows=256 + start)
    deal.reroute(ids_TK, rows_RW, slots_RS, quota_ER, my_rank=start % R)
    pull.pull_experts(experts_PR, slots_RS, staged_P, my_rank=1, num_programs=16 + start)
    weights_TK, amounts_T = torch.zeros(num_tokens, K), flags_T.int() if start else None
    _, keys_TK = count.count_experts(
        ids_TK, weights_TK, flags_T, amounts_T, num_experts=E, topk=K, key_rule=RULE
    )
    cuts = plan.plan_cuts(histograms_RW, capacity_G, my_rank=start % R, num_experts=E)
    cut.cut_tokens(
        ids_TK, weights_TK, keys_TK, flags_T, amounts_T, *cuts, num_experts=E, topk=K
    )
    lower.plan_downgrade(
        rows_RW, num_experts=E, capacity_factor=1.0 + start, vision_share=0.5, form=start % 3
    )
    convert.convert_fp8(
        WEIGHTS, LOW, SCALES, wanted_E=low_E[start : start + 4], num_programs=1 + start
    )
    x_TH = torch.zeros(num_tokens, 512)[:, 256 * (start == 1) :].bfloat16()
    quantise.quantise_rows(x_TH, num_rows_valid=low_E[start] if start else None)
    quantise.silu_mul_quantise(x_TH, column_major=start > 0)
    room_eMH = torch.zeros(1, 4 * num_tokens, 256).bfloat16()
    quantise.quantise_masked_rows(room_eMH, low_E[start : start + 1])
    quantise.quantise_rows_ue8m0(x_TH)

CASES = [
    (num_tokens, start, dtype)
    for num_tokens in (1, 1000, 16384)
    for start in (0, 1, 16)
    for dtype in (torch.int32, torch.int64)
]
LAUNCHERS = (
    count._launch, place._launch, deal._launch_prepare, deal._launch_apply, pull._launch,
    plan._launch, cut._launch_mark, cut._launch_find, cut._launch_apply, lower._launch,
    convert._launch, quantise._launch_rows, quantise._launch_masked, quantise._launch_ue8m0,
)

def run_all(forget):
    launched.clear()
    for case in CASES:
        if forget:
            for launcher in LAUNCHERS:
                launcher._held.clear()
        run(*case)
    return list(launched)

by_triton = run_all(forget=True)
run_all(forget=False)
for launcher in LAUNCHERS:
    launcher._kernel.run = None  # whoever asks Triton again fails
again = run_all(forget=False)
print(json.dumps({"by_triton": by_triton, "again": again}))
"""


@pytest.fixture(scope="module")
def launches() -> dict[str, list[str]]:
    """Name, warps, grid and arguments of every launch, by Triton and again."""
    return compiled(PROGRAM)


def test_a_launch_again_is_the_launch_that_triton_would_make(
    launches: dict[str, list[str]],
) -> None:
    """Also of tensors that are not aligned, which take another variant."""
    assert len(launches["again"]) == (5 + 5 + 6) * 3 * 3 * 2
    assert launches["again"] == launches["by_triton"]
