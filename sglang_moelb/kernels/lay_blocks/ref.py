"""Reference of `lay_blocks` in plain torch. Shape letters as in the package."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCKS = (8, 16, 32, 48, 64)  # rows of a block that Marlin has kernels for


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """Tables like those of SGLang's `moe_align_block_size`, all int32.

    `rows`: those of each block, one block after another, S for none. `experts`: of each block,
    ascending. `used` (2): how far `rows` has any, and 0, the number of blocks without an expert.
    What lies behind means nothing.
    """

    rows: Tensor
    experts: Tensor
    used: Tensor


def lay_blocks(num_rows_e: Tensor, *, num_rows: int, room: int, block: int) -> Blocks:
    """See `sglang_moelb.kernels.lay_blocks`. Reads the numbers on the host."""
    num_blocks = check_blocks(num_rows_e, num_rows=num_rows, room=room, block=block)
    rows: list[int] = []
    experts: list[int] = []
    begin = 0
    for expert, count in enumerate(num_rows_e.tolist()):
        begin = expert * room if room else begin
        for at in range(0, count, block):
            own = range(begin + at, begin + min(at + block, count))
            rows += [*own, *(num_rows,) * (block - len(own))]
            experts.append(expert)
        begin += count
    used = [len(rows), 0]
    rows += (num_rows,) * (num_blocks * block - len(rows))
    experts += (len(num_rows_e) - 1,) * (num_blocks - len(experts))
    made = (torch.tensor(x, dtype=torch.int32, device=num_rows_e.device)
            for x in (rows, experts, used))  # fmt: skip
    return Blocks(**dict(zip(("rows", "experts", "used"), made, strict=True)))


def check_blocks(num_rows_e: Tensor, *, num_rows: int, room: int, block: int) -> int:
    """The most blocks that there can be. ValueError for what is not taken. Host only, no sync."""
    if block not in BLOCKS:
        raise ValueError(f"blocks of {block} rows: Marlin takes {', '.join(map(str, BLOCKS))}")
    num_experts = num_rows_e.numel()
    if num_rows_e.dtype != torch.int32 or num_rows_e.dim() != 1 or not num_experts:
        raise ValueError(
            f"numbers of rows are {num_rows_e.dtype} {tuple(num_rows_e.shape)}: give one int32 an "
            "expert"
        )
    if room and num_rows != num_experts * room:
        raise ValueError(f"{num_rows} rows are not {num_experts} experts with room for {room}")
    return num_experts * -(-room // block) if room else num_rows // block + num_experts
