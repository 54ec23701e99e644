"""Triton kernel of `pull_experts`: programs that walk over the chunks of all slots in use.

A program reads the plan itself. Piece i of the work is chunk i // n of the (i % n)-th of the n
slots in use, so programs that run side by side read from different experts.

Example: rank 1 of 2 with two experts each, slots [1, -1, 0], experts of two chunks, two programs:

    in use    slots 0 and 2, n = 2, four pieces
    program 0 expert 1 chunk 0 to slot 0, then its chunk 1
    program 1 expert 0 chunk 0 to slot 2, then its chunk 1

Shape letters: R ranks, S slots of a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_moelb.kernels.pull_experts.ref import check_pull

CHUNK_WORDS = 16384  # 64 KiB a program in flight, so that 32 cover the latency of NVLink
WORD_BYTES = 4


@triton.jit
def _pull(
    addresses_ptr,
    slots_ptr,
    staged_ptr,
    MY_RANK: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    NUM_LOCAL: tl.constexpr,
    EXPERT_WORDS: tl.constexpr,
    TILE_SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    slot = tl.arange(0, TILE_SLOTS)
    held = tl.load(slots_ptr + MY_RANK * NUM_SLOTS + slot, mask=slot < NUM_SLOTS, other=-1)
    used = held >= 0
    order = tl.cumsum(used.to(tl.int32), axis=0)
    num_used = tl.sum(used.to(tl.int32))
    num_pieces = num_used * tl.cdiv(EXPERT_WORDS, CHUNK)
    for piece in range(tl.program_id(0), num_pieces, tl.num_programs(0)):
        is_it = used & (order == piece % num_used + 1)
        expert = tl.sum(tl.where(is_it, held, 0))
        to = tl.sum(tl.where(is_it, slot, 0))
        word = (piece // num_used) * CHUNK + tl.arange(0, CHUNK)
        inside = word < EXPERT_WORDS
        source = tl.load(addresses_ptr + expert // NUM_LOCAL).to(tl.pointer_type(tl.int32))
        source = tl.multiple_of(source, 16)
        source += (expert % NUM_LOCAL).to(tl.int64) * EXPERT_WORDS
        words = tl.load(source + word, mask=inside, other=0)
        tl.store(staged_ptr + to.to(tl.int64) * EXPERT_WORDS + word, words, mask=inside)


@lru_cache(maxsize=1024)
def _addresses(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """The addresses on the device; brought there at the first call, which waits for the host."""
    return torch.tensor(addresses, dtype=torch.int64, device=device)


def pull_experts(
    experts_R: Sequence[Tensor],
    slots_RS: Tensor,
    staged: Tensor,
    *,
    my_rank: int,
    num_programs: int = 32,
) -> None:
    """See `sglang_moelb.kernels.pull_experts`. Runs on the device of its tensors, no sync."""
    check_pull(experts_R, slots_RS, staged, my_rank, num_programs)
    num_slots = slots_RS.shape[1]
    if num_slots == 0:
        return
    expert_bytes = experts_R[0][:1].numel() * staged.element_size()
    addresses = tuple(experts.data_ptr() for experts in experts_R)
    _pull[(num_programs,)](
        _addresses(addresses, staged.device),
        slots_RS.contiguous(),
        staged.view(-1).view(torch.int32),
        MY_RANK=my_rank,
        NUM_SLOTS=num_slots,
        NUM_LOCAL=len(experts_R[0]),
        EXPERT_WORDS=expert_bytes // WORD_BYTES,
        TILE_SLOTS=triton.next_power_of_2(num_slots),
        CHUNK=CHUNK_WORDS,
        num_warps=16,
    )
