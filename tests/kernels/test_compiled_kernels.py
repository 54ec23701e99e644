"""Kernels that count, plan and move weights compile for Hopper as meant, without a GPU.

The child process calls the ops on CPU tensors under `no_gpu_driver`, and prints what it found.
"""

from __future__ import annotations

import re

import pytest

from tests.kernels.compiled import compiled

PROGRAM = """
import json
import torch
import no_gpu_driver
from sglang_moelb.kernels import row_layout
from sglang_moelb.kernels.convert_fp8 import kernel as convert
from sglang_moelb.kernels.count_experts import kernel as counts_of
from sglang_moelb.kernels.keys import KeyRule
from sglang_moelb.kernels.join_rows import kernel as join
from sglang_moelb.kernels.lay_blocks import kernel as lay
from sglang_moelb.kernels.plan_downgrade import kernel as plan
from sglang_moelb.kernels.pull_experts import kernel as pull
from sglang_moelb.kernels.quantise_rows import kernel as rows

weights = [torch.zeros(4, 256, 128).bfloat16(), torch.zeros(4, 128, 384).bfloat16()]
out = [torch.zeros(weight.shape).to(torch.float8_e4m3fn) for weight in weights]
scales = [torch.zeros(4, 2, 1), torch.zeros(4, 1, 3)]
numbers = torch.ones(9, dtype=torch.int32)
for start in (0, 1):
    for num_programs in (1, 20, None):
        convert.convert_fp8(
            weights, out, scales, wanted_E=numbers[start : start + 4], num_programs=num_programs
        )
for num_rows in (5, 16, 1000):
    rows.quantise_rows_ue8m0(torch.zeros(num_rows, 512).bfloat16())
    for column_major in (False, True):
        for count in (None, numbers[:1], numbers[1:2]):
            for op in (rows.quantise_rows, rows.silu_mul_quantise):
                x = torch.zeros(num_rows, 512).bfloat16()
                op(x, num_rows_valid=count, column_major=column_major)
ids, flags = torch.zeros(300, 8).long(), torch.zeros(300).byte()
for num_tokens in (1, 16, 300):
    for rule in (None, KeyRule(metric=0, preference=0), KeyRule(metric=2, preference=1)):
        for amounts in (None, numbers.new_ones(300)[:num_tokens]):
            counts_of.count_experts(
                ids[:num_tokens], ids[:num_tokens].float(), flags[:num_tokens], amounts,
                num_experts=128, topk=8, key_rule=rule,
            )
    counts_of.count_layers(ids[None, :num_tokens].contiguous(), flags[:num_tokens], num_experts=128)
counts = torch.zeros(4, row_layout.row_width(128, with_histogram=False), dtype=torch.int32)
for form in range(3):
    for share in (0.0, 0.5, 1.0):
        plan.plan_downgrade(
            counts, num_experts=128, capacity_factor=1.0 + share, vision_share=share, form=form
        )
slots = torch.zeros(2, 3, dtype=torch.int32)
for start in (0, 1):
    experts = [[torch.zeros(4, width).bfloat16()] * 2 for width in (256, 128)]
    staged = [torch.zeros(3, width).bfloat16() for width in (256, 128)]
    for my_rank in (0, 1):
        pull.pull_experts(experts, slots, staged, my_rank=my_rank, num_programs=20 + start)
for max_rows in (16, 256):
    for num_experts in (1, 3):
        masked = torch.zeros(num_experts, max_rows, 512).bfloat16()
        for count in (numbers[:num_experts], numbers[1 : 1 + num_experts]):
            rows.quantise_masked_rows(masked, count)
for max_rows in (1, 16):
    for num_first in (1, 2):
        done = torch.zeros(4, max_rows, 2048).bfloat16()
        for start in (0, 1):
            join.join_rows(done[:num_first], done[num_first:], numbers[start : start + 4])
for room, block in ((0, 8), (16, 64), (5, 48)):
    for start in (0, 1):
        lay.lay_blocks(
            numbers[start : start + 4], num_rows=4 * room or 1000, room=room, block=block
        )
jits = {"convert": convert._convert, "quantise": rows._quantise}
jits |= {"plan": plan._plan, "pull": pull._pull, "count": counts_of._count}
jits |= {"masked": rows._quantise_masked, "join": join._join}
jits |= {"lay": lay._lay}
jits |= {"powers": rows._quantise_ue8m0}
for name, jit in jits.items():
    (cache,) = (caches[0] for caches in jit.device_caches.values())
    jits[name] = [variant.asm["ptx"] for variant in cache.values()]
print(json.dumps(jits))
"""


@pytest.fixture(scope="module")
def ptx() -> dict[str, list[str]]:
    """Every variant of each kernel that a few calls have compiled."""
    return compiled(PROGRAM)


def test_only_shapes_and_options_make_a_variant(ptx: dict[str, list[str]]) -> None:
    """A variant compiled in a live pass would make the other ranks wait."""
    assert {name: len(variants) for name, variants in ptx.items()} == {
        "convert": 2,  # one program an SM, or more
        "quantise": 4,  # gated or not, all rows or some
        "masked": 2,  # one program an expert and group, or more
        "join": 1,
        "lay": 1,
        "powers": 1,
        "plan": 3,  # forms
        "pull": 2,  # ranks
        "count": 5,  # with keys or not, with amounts or not; many layers at once
    }


def test_weights_and_rows_are_read_16_bytes_a_thread(ptx: dict[str, list[str]]) -> None:
    for text in ptx["convert"]:
        assert re.search(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], 0x10\b", text)
        assert len(re.findall(r"\bld\.global", text)) == 1  # wanted_E
    for text in (*ptx["quantise"], *ptx["powers"]):
        wide = re.findall(r"\bld\.global\S*\.v4\.b32", text)
        assert len(re.findall(r"\bld\.global", text)) - len(wide) <= 1  # num_rows_valid
        assert wide


def test_masked_rows_are_read_and_joined_16_bytes_a_thread(ptx: dict[str, list[str]]) -> None:
    for text in (*ptx["masked"], *ptx["join"]):
        narrow = re.findall(r"\bld\.global(?!\S*\.v4\.b32)", text)
        assert len(narrow) <= 1  # the number of rows
        assert re.search(r"\bld\.global\S*\.v4\.b32", text)
    for text in ptx["join"]:
        assert not re.search(r"\bst\.global(?!\S*\.v4\.b32)", text)


def test_experts_are_copied_16_bytes_a_thread(ptx: dict[str, list[str]]) -> None:
    for text in ptx["pull"]:
        loads = re.findall(r"\bld\.global\S*", text)
        wide = [load for load in loads if ".v4.b32" in load]
        assert len(wide) == 8
        assert len(loads) - len(wide) <= 3  # the plan, and two addresses
        stores = re.findall(r"\bst\.global\S*", text)
        assert len(stores) == 8
        assert all(".v4.b32" in store for store in stores)


def test_values_are_cast_by_the_instruction_that_saturates(ptx: dict[str, list[str]]) -> None:
    for text in (*ptx["convert"], *ptx["quantise"], *ptx["masked"], *ptx["powers"]):
        assert "cvt.rn.satfinite.e4m3x2.f32" in text
        assert "div.rn.f32" in text
        assert ".ftz" not in text
