"""Triton kernel of `pull_experts`: programs that walk over the chunks of all slots in use.

A program reads the plan itself. Piece i of the work is chunk i // n of the (i % n)-th of the n
slots in use, so programs that run side by side read from different experts. An expert's chunks are
those of its first part, then those of its second.

Example: rank 1 of 2 with two experts each, slots [1, -1, 0], experts of two chunks, two programs:

    in use    slots 0 and 2, n = 2, four pieces
    program 0 expert 1 chunk 0 to slot 0, then its chunk 1
    program 1 expert 0 chunk 0 to slot 2, then its chunk 1

Shape letters: P parts of an expert's weights, R ranks, S slots of a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_moelb.kernels.launch import Launcher, Variant, variant_of
from sglang_moelb.kernels.pull_experts.ref import check_pull

CHUNK_WORDS = 16384  # 64 KiB a program in flight: 16 programs fill the NVLink of an H100
WORD_BYTES = 4


@triton.jit
def _pull(
    addresses_ptr,
    slots_ptr,
    MY_RANK: tl.constexpr,
    NUM_RANKS: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    NUM_LOCAL: tl.constexpr,
    WORDS_0: tl.constexpr,
    WORDS_1: tl.constexpr,
    TILE_SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    slot = tl.arange(0, TILE_SLOTS)
    held = tl.load(slots_ptr + MY_RANK * NUM_SLOTS + slot, mask=slot < NUM_SLOTS, other=-1)
    used = held >= 0
    order = tl.cumsum(used.to(tl.int32), axis=0)
    num_used = tl.sum(used.to(tl.int32))
    CHUNKS_0: tl.constexpr = (WORDS_0 + CHUNK - 1) // CHUNK
    CHUNKS_1: tl.constexpr = (WORDS_1 + CHUNK - 1) // CHUNK
    num_pieces = num_used * (CHUNKS_0 + CHUNKS_1)
    for piece in range(tl.program_id(0), num_pieces, tl.num_programs(0)):
        is_it = used & (order == piece % num_used + 1)
        expert = tl.sum(tl.where(is_it, held, 0))
        to = tl.sum(tl.where(is_it, slot, 0))
        chunk = piece // num_used
        part = (chunk >= CHUNKS_0).to(tl.int32)
        num_words = tl.where(part == 0, WORDS_0, WORDS_1)
        word = (chunk - part * CHUNKS_0) * CHUNK + tl.arange(0, CHUNK)
        inside = word < num_words
        # An expert's bytes are a multiple of 16, and so is where it begins.
        num_words = tl.multiple_of(num_words, 4)
        row_ptr = addresses_ptr + part * (NUM_RANKS + 1)
        source = tl.load(row_ptr + expert // NUM_LOCAL).to(tl.pointer_type(tl.int32))
        staged = tl.load(row_ptr + NUM_RANKS).to(tl.pointer_type(tl.int32))
        source = tl.multiple_of(source, 16) + (expert % NUM_LOCAL).to(tl.int64) * num_words
        staged = tl.multiple_of(staged, 16) + to.to(tl.int64) * num_words
        words = tl.load(source + word, mask=inside, other=0)
        tl.store(staged + word, words, mask=inside)


@dataclass(frozen=True, slots=True)
class _Known:
    """Tensors that belong together: their addresses on the device, and the variant for them."""

    table: Tensor
    variant: Variant


_known: dict[tuple[Any, ...], _Known] = {}


def _look(
    experts_PR: Sequence[Sequence[Tensor]],
    slots_RS: Tensor,
    staged_P: Sequence[Tensor],
    my_rank: int,
) -> _Known:
    """Bring the addresses to the device, which waits for the host."""
    addresses = [
        tensor.data_ptr()
        for experts_R, staged in zip(experts_PR, staged_P, strict=True)
        for tensor in (*experts_R, staged)
    ]
    words_P = [
        experts_R[0].stride(0) * experts_R[0].element_size() // WORD_BYTES
        for experts_R in experts_PR
    ]
    num_ranks, num_slots = slots_RS.shape
    variant = variant_of(
        num_warps=16,
        MY_RANK=my_rank,
        NUM_RANKS=num_ranks,
        NUM_SLOTS=num_slots,
        NUM_LOCAL=experts_PR[0][0].shape[0],
        WORDS_0=words_P[0],
        WORDS_1=words_P[1] if len(words_P) > 1 else 0,
        TILE_SLOTS=triton.next_power_of_2(num_slots),
        CHUNK=CHUNK_WORDS,
    )
    return _Known(torch.tensor(addresses, dtype=torch.int64, device=slots_RS.device), variant)


def pull_experts(
    experts_PR: Sequence[Sequence[Tensor]],
    slots_RS: Tensor,
    staged_P: Sequence[Tensor],
    *,
    my_rank: int,
    num_programs: int = 16,
) -> None:
    """See `sglang_moelb.kernels.pull_experts`. Runs on the device of its tensors, no sync."""
    # What has been found to belong together is not looked through again in every layer.
    key = (
        slots_RS.device,
        slots_RS.shape,
        my_rank,
        num_programs,
        len(experts_PR),
        *[
            (tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.is_contiguous())
            for tensors in (*experts_PR, staged_P)
            for tensor in tensors
        ],
    )
    known = _known.get(key)
    if known is None:
        check_pull(experts_PR, slots_RS, staged_P, my_rank, num_programs)
        if slots_RS.shape[1] == 0:
            return
        known = _known[key] = _look(experts_PR, slots_RS, staged_P, my_rank)
    _launch((num_programs, 1, 1), known.variant, (known.table, slots_RS.contiguous()))


_launch = Launcher(_pull)
