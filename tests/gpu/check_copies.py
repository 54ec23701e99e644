"""On a CUDA device: the kernels of copies of experts against their references, exactly.

Those that choose a copy, fill slots, compare what was moved, and lay the rows of decode for grouped
GEMMs; with the device's own memory for all ranks. Run from the root:
`python tests/gpu/check_copies.py`; all of it is small, as for `compute-sanitizer`. Ends with status
1 and the first bad coordinates if anything differs. Needs torch and triton.

Shape letters: T tokens, K top-k, E experts, C most copies, B bounds, R ranks, S slots of a rank,
P parts of an expert's weights, e local experts, M rows of room, H features, G groups.
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # runs from a checkout, nothing installed

from fp8_inputs import assert_same_fp8, no_host_sync  # noqa: E402

from sglang_moelb.kernels.choose_copy import choose_copy  # noqa: E402
from sglang_moelb.kernels.choose_copy.ref import UNITS  # noqa: E402
from sglang_moelb.kernels.join_rows import join_rows  # noqa: E402
from sglang_moelb.kernels.lay_blocks import lay_blocks  # noqa: E402
from sglang_moelb.kernels.lay_blocks.ref import BLOCKS  # noqa: E402
from sglang_moelb.kernels.pull_experts import pull_experts  # noqa: E402
from sglang_moelb.kernels.quantise_rows import quantise_masked_rows  # noqa: E402
from sglang_moelb.kernels.sum_words import sum_words  # noqa: E402
from sglang_moelb.kernels.testing import assert_close  # noqa: E402

KEPT = 9.0
# Rows of each local expert, with room for 12: none, full, the first and the last expert empty.
NUMBERS = ([0, 0, 0], [12, 12, 12], [0, 12, 1], [5, 1, 0], [12])


def check_choices() -> None:
    """`choose_copy` by turns and by shares, strided ids, ids of no expert, the last copy of all."""
    generator = torch.Generator().manual_seed(1)
    num_copies_E = torch.tensor([1, 3, 2, 4], dtype=torch.int32)
    copies_EC = torch.arange(16, dtype=torch.int32).view(4, 4)
    bounds_EB = torch.zeros(4, 6, dtype=torch.int32)
    bounds_EB[1:3] = UNITS
    bounds_EB[1, :2] = torch.tensor([9, UNITS - 1])
    bounds_EB[2, 0] = 1
    tables = (copies_EC, num_copies_E, bounds_EB)
    for num_tokens, topk in ((0, 4), (1, 8), (7, 1), (700, 3)):
        wide = torch.randint(-2, 6, (num_tokens, 2 * topk), generator=generator)
        for dtype, shift in product((torch.int64, torch.int32), (0, 5)):
            for columns in (slice(topk), slice(topk, None), slice(None, None, 2)):
                ids_TK = wide.to(dtype)[:, columns]
                expected_TK = choose_copy(ids_TK, *tables, shift=shift)
                given_TK = wide.to(dtype).cuda()[:, columns]
                out_TK = choose_copy(given_TK, *(t.cuda() for t in tables), shift=shift)
                name = f"choose_copy T={num_tokens} K={topk} {dtype} {columns} {shift=}"
                assert_close(name, expected_TK, out_TK)
    print("choose_copy: equal")


def check_pulls() -> None:
    """`pull_experts` into slots in use; others keep what they hold. One device is all ranks."""
    slots_RS = torch.tensor([[5, -1, 2], [-1, -1, -1], [-1, 0, 3]], dtype=torch.int32)
    shapes = ((180, 400), (96, 180))  # in bfloat16 two chunks and a bit, and less than one
    generator = torch.Generator().manual_seed(2)
    for shapes_P, num_programs in product((shapes, shapes[::-1], shapes[:1]), (1, 3, 32)):
        experts_PR = [
            list(torch.randn(3, 2, *shape, generator=generator).bfloat16()) for shape in shapes_P
        ]
        device_PR = [[own.cuda() for own in experts_R] for experts_R in experts_PR]
        for rank in range(3):
            staged_P = [torch.full((3, *shape), KEPT).bfloat16() for shape in shapes_P]
            device_P = [staged.cuda() for staged in staged_P]
            options = {"my_rank": rank, "num_programs": num_programs}
            pull_experts(experts_PR, slots_RS, staged_P, **options)
            pull_experts(device_PR, slots_RS.cuda(), device_P, **options)
            for part, (staged, out) in enumerate(zip(staged_P, device_P, strict=True)):
                name = f"pull_experts {shapes_P} {options}, part {part}"
                assert_close(name, staged, out, tolerance=0.0)
    print("pull_experts: equal")


def check_sums() -> None:
    """`sum_words` of runs that end before, at and behind a program's words."""
    generator = torch.Generator().manual_seed(3)
    for num_words in (0, 1, 2, 4095, 4096, 4097, 9000):
        run_B = torch.randint(256, (8 * num_words,), generator=generator, dtype=torch.uint8)
        assert_close(f"sum_words of {num_words}", sum_words(run_B), sum_words(run_B.cuda()))
    print("sum_words: equal")


def check_blocks() -> None:
    """`lay_blocks` in every block, with room and without, numbers at any address."""
    numbers = (*NUMBERS, [7, 0, 40, 8, 1, 0, 39], [5] * 128)
    for given, room, block in product(numbers, (0, 40), BLOCKS):
        num_rows_e = torch.tensor([99, *given], dtype=torch.int32)
        num_rows = len(given) * room if room else sum(given) + 13
        options = {"num_rows": num_rows, "room": room, "block": block}
        expected = lay_blocks(num_rows_e[1:], **options)
        out = lay_blocks(num_rows_e.cuda()[1:], **options)
        for field in ("rows", "experts", "used"):
            name = f"lay_blocks {given} {options}, {field}"
            assert_close(name, getattr(expected, field), getattr(out, field))
    print("lay_blocks: equal")


def check_rows_of_decode() -> None:
    """`join_rows` and `quantise_masked_rows` in the rows that an expert has."""
    generator = torch.Generator().manual_seed(4)
    for given, width in product(NUMBERS, (128, 384, 2048, 2176)):
        rows_eMH = torch.randn(len(given), 12, width, generator=generator).bfloat16()
        rows_eMH *= torch.logspace(-6, 3, 12)[:, None].bfloat16()
        device_eMH = rows_eMH.cuda()
        num_rows_e = torch.tensor([99, *given], dtype=torch.int32).cuda()[1:]
        for num_first in {0, 1, len(given)}:
            parts = (device_eMH[:num_first].clone(), device_eMH[num_first:].clone())
            with no_host_sync():
                joined_eMH = join_rows(*parts, num_rows_e)
            name = f"join_rows {given} H={width} {num_first=}"
            _compare_rows(name, rows_eMH, joined_eMH, given)
        expected_q, expected_scale = quantise_masked_rows(rows_eMH, num_rows_e.cpu())
        with no_host_sync():
            q_eMH, scale_eMG = quantise_masked_rows(device_eMH, num_rows_e)
        name = f"quantise_masked_rows {given} H={width}"
        for expert, count in enumerate(given):
            assert_same_fp8(name, expected_q[expert, :count], q_eMH[expert, :count])
        _compare_rows(f"{name}, scales", expected_scale, scale_eMG, given)
    print("join_rows, quantise_masked_rows: equal")


def _compare_rows(name: str, expected: Tensor, out: Tensor, given: list[int]) -> None:
    assert expected.shape == out.shape, f"{name}: {tuple(out.shape)}"
    for expert, count in enumerate(given):
        own = (expected[expert, :count], out[expert, :count])
        assert_close(f"{name}, expert {expert}", *own, tolerance=0.0)


def main() -> None:
    """Run all checks."""
    parser = argparse.ArgumentParser(description="Check the kernels of copies on a CUDA device.")
    parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("check_copies.py needs a CUDA device, and torch sees none")
    check_choices()
    check_pulls()
    check_sums()
    check_blocks()
    check_rows_of_decode()


if __name__ == "__main__":
    main()
