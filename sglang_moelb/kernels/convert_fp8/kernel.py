"""Triton kernel of `convert_fp8`: one launch of persistent programs over the blocks that count.

Wanted experts are numbered 0, 1, .. in order. Tile i is block i % B of the (i // B)-th of them,
where B counts the blocks of an expert over all weights; program p takes the tiles p, p + P, ...
so that the work is even whatever experts are wanted, and a launch that wants none ends at once.
Loads of the next tiles are in flight while one is converted.

Example: wanted [0, 1, 1], weights of 2 and 1 blocks an expert (B = 3), P = 4 programs:

    tile      0        1        2        3        4        5
    expert    1        1        1        2        2        2
    weight    0        0        1        0        0        1
    program   0        1        2        3        0        1

Shape letters: E experts, N output features, K input features.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_moelb.kernels import fp8, fp8_device
from sglang_moelb.kernels.convert_fp8.ref import check_weights
from sglang_moelb.kernels.launch import Launcher, variant_of

PROGRAMS_PER_SM = 2
# Warps and stages of a program that has its SM for itself, and of programs that share one. Loads of
# stages - 1 tiles of 32 KB are in flight. benchmarks/gpu/bench_fp8.py times these and others.
FORM_ALONE = (16, 4)
FORM_SHARED = (8, 3)

BLOCK = fp8_device.GROUP


@triton.jit
def _pick(tile, FIRST_TILES: tl.constexpr, options):
    """The option of the weight to which a tile of an expert belongs."""
    picked = options[0]
    for i in tl.static_range(1, len(FIRST_TILES)):
        picked = tl.where(tile >= FIRST_TILES[i], options[i], picked)
    return picked


@triton.jit(do_not_specialize_on_alignment=["wanted_ptr"])
def _convert(
    weight_ptrs,
    out_ptrs,
    scale_ptrs,
    wanted_ptr,
    NUM_EXPERTS: tl.constexpr,
    TILE_EXPERTS: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    BLOCKS_WIDE: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    FIRST_TILES: tl.constexpr,
    NUM_TILES: tl.constexpr,
    IS_EVEN: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    expert_id = tl.arange(0, TILE_EXPERTS)
    wanted = tl.load(wanted_ptr + expert_id, mask=expert_id < NUM_EXPERTS, other=0) != 0
    number = tl.cumsum(wanted.to(tl.int32), axis=0) - 1
    num_wanted = tl.sum(wanted.to(tl.int32), axis=0)
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    for i in tl.range(
        tl.program_id(0), num_wanted * NUM_TILES, tl.num_programs(0), num_stages=NUM_STAGES
    ):
        is_ith = wanted & (number == i // NUM_TILES)
        expert = tl.sum(tl.where(is_ith, expert_id, 0), axis=0).to(tl.int64)
        tile = i % NUM_TILES
        block = tile - _pick(tile, FIRST_TILES, FIRST_TILES)
        blocks_wide = _pick(tile, FIRST_TILES, BLOCKS_WIDE)
        num_rows = _pick(tile, FIRST_TILES, NUM_ROWS)
        num_columns = _pick(tile, FIRST_TILES, NUM_COLUMNS)
        first_row = (block // blocks_wide) * BLOCK
        first_column = (block % blocks_wide) * BLOCK
        start = (expert * num_rows + first_row) * num_columns + first_column
        weight_at = _pick(tile, FIRST_TILES, weight_ptrs) + start + (row * num_columns + column)
        out_at = _pick(tile, FIRST_TILES, out_ptrs) + start + (row * num_columns + column)
        # 8 values a thread in loads and stores alike: with 16 a load would take half sectors.
        out_at = tl.max_contiguous(out_at, [1, 8])
        scale_at = _pick(tile, FIRST_TILES, scale_ptrs) + expert * _pick(
            tile, FIRST_TILES, NUM_BLOCKS
        )
        if IS_EVEN:
            weight = tl.load(weight_at).to(tl.float32)
        else:
            inside = (first_row + row < num_rows) & (first_column + column < num_columns)
            weight = tl.load(weight_at, mask=inside, other=0.0).to(tl.float32)
        scale, inverse = fp8_device.scale_of(tl.max(tl.abs(weight)))
        values = fp8_device.to_fp8(weight * inverse)
        if IS_EVEN:
            tl.store(out_at, values)
        else:
            tl.store(out_at, values, mask=inside)
        tl.store(scale_at + block, scale)


def convert_fp8(
    weights: Sequence[Tensor],
    out: Sequence[Tensor],
    scales: Sequence[Tensor],
    *,
    wanted_E: Tensor,
    num_programs: int | None = None,
) -> None:
    """See `sglang_moelb.kernels.convert_fp8`. Runs on the device of its tensors, no sync."""
    check_weights(weights, out, scales, wanted_E)
    num_sms = _num_sms(wanted_E.device)
    if num_programs is None:
        num_programs = PROGRAMS_PER_SM * num_sms
    num_warps, num_stages = FORM_ALONE if num_programs <= num_sms else FORM_SHARED
    launch(
        weights,
        out,
        scales,
        wanted_E=wanted_E,
        num_programs=num_programs,
        num_warps=num_warps,
        num_stages=num_stages,
    )


def launch(
    weights: Sequence[Tensor],
    out: Sequence[Tensor],
    scales: Sequence[Tensor],
    *,
    wanted_E: Tensor,
    num_programs: int,
    num_warps: int,
    num_stages: int,
) -> None:
    """`convert_fp8` in a form of the kernel that is not chosen by it, for benchmarks."""
    blocks = [tuple(scale.shape[1:]) for scale in scales]
    num_blocks = tuple(high * wide for high, wide in blocks)
    num_tiles, num_experts = sum(num_blocks), wanted_E.numel()
    num_programs = min(num_programs, num_tiles * num_experts)
    if num_programs == 0:
        return
    variant = variant_of(
        num_warps=num_warps,
        NUM_EXPERTS=num_experts,
        TILE_EXPERTS=triton.next_power_of_2(num_experts),
        NUM_ROWS=tuple(weight.shape[1] for weight in weights),
        NUM_COLUMNS=tuple(weight.shape[2] for weight in weights),
        BLOCKS_WIDE=tuple(wide for _, wide in blocks),
        NUM_BLOCKS=num_blocks,
        FIRST_TILES=tuple(sum(num_blocks[:i]) for i in range(len(num_blocks))),
        NUM_TILES=num_tiles,
        IS_EVEN=all(size % fp8.GROUP == 0 for weight in weights for size in weight.shape[1:]),
        NUM_STAGES=num_stages,
    )
    _launch((num_programs, 1, 1), variant, (tuple(weights), tuple(out), tuple(scales), wanted_E))


_launch = Launcher(_convert)


@cache
def _num_sms(device: torch.device) -> int:
    if device.type != "cuda":  # the interpreter
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
