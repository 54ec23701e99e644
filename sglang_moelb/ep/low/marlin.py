"""Weights in 4 bits (MXFP4) under rows in bfloat16: for experts that stay low, on Hopper by Marlin.

MXFP4 as SGLang, DeepGEMM and FlashInfer write it: e2m1 codes, for 32 weights of a row one power of
two, the least that keeps them within 6. Marlin decodes that exactly to bfloat16. On a GPU only
Marlin's order of the bytes is kept, on the host codes and scales row by row; sizes are equal.

The host computes the same by decoding, and rounds where Marlin rounds: the outputs of both GEMMs
and the activation to bfloat16.

Shape letters: e local experts of this rank, N received rows, K top-k, T selections of theirs that
are here, S rows expert by expert, M rows that DeepEP has room for in an expert in low latency, H
hidden size, I expert size, J = 2I gate and up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  torch's own spelling

from sglang_moelb.ep.expert_rows import WEIGHTS, in_bfloat16
from sglang_moelb.ep.low import marlin_library
from sglang_moelb.ep.low.marlin_library import GROUP
from sglang_moelb.kernels.block_format import BlockFormat, BlockScaled
from sglang_moelb.kernels.convert_fp4 import convert_fp4
from sglang_moelb.kernels.grouped_fp4 import grouped_fp4
from sglang_moelb.kernels.lay_blocks import lay_blocks
from sglang_moelb.kernels.lay_blocks.ref import BLOCKS

NAME = "mxfp4"
FORMAT = BlockFormat.MXFP4_CEIL
FULL_ENOUGH = 0.9  # of a block in the mean, or it is taken larger; as in SGLang


@dataclass(frozen=True, kw_only=True, slots=True)
class MarlinWeights:
    """Both projections of a layer's local experts.

    On a GPU codes are int32 `[e, H/16, 2J]` and `[e, I/16, 2H]`, scales e8m0 bytes `[e, H/32, J]`
    and `[e, I/32, H]`; on the host codes are bytes `[e, J, H/2]` and `[e, H, I/2]`, scales bytes
    `[e, J, H/32]` and `[e, H, I/32]`.
    """

    w13: torch.Tensor
    w2: torch.Tensor
    w13_scale: torch.Tensor
    w2_scale: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """Memory of the four tensors."""
        return sum(t.nbytes for t in (self.w13, self.w2, self.w13_scale, self.w2_scale))


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertRows:
    """Rows in the order of their experts, `[S, H]` bfloat16, `num_rows_e` of each.

    `room` as `lay_blocks` takes it. `mean` is about what an expert has. `place_NK`: where each
    selection's row stands; None in low latency, where a row is of one expert.
    """

    rows_SH: torch.Tensor
    num_rows_e: torch.Tensor
    room: int
    mean: float
    place_NK: torch.Tensor | None


def allocate(layer: Any) -> MarlinWeights:
    """Room for the low-precision weights of a layer like `layer`, filled with zeros.

    Plain tensors, as in `fp8.allocate`.
    """
    parts: dict[str, torch.Tensor] = {}
    for name in ("w13", "w2"):
        weight = getattr(layer, f"{name}_weight")
        num_experts, num_rows, width = weight.shape
        codes, scales, dtype = (num_rows, width // 2), (num_rows, width // GROUP), torch.uint8
        if weight.is_cuda:
            codes, scales, dtype = (width // 16, 2 * num_rows), scales[::-1], torch.int32
        on = {"device": weight.device}
        parts[name] = torch.zeros(num_experts, *codes, dtype=dtype, **on)
        parts[f"{name}_scale"] = torch.zeros(num_experts, *scales, dtype=torch.uint8, **on)
    return MarlinWeights(**parts)


def store(layer: Any, expert: int, into: MarlinWeights) -> None:
    """Write local expert `expert` of `layer` into the one place of `into`; no host sync.

    On the current stream. On a GPU by way of codes and scales row by row, which are then free
    again: few launches, for they are what a move of an expert takes of a pass.
    """
    weights = tuple(
        in_bfloat16(getattr(layer, name).data[expert : expert + 1]) for name in WEIGHTS
    )
    places = ((into.w13, into.w13_scale), (into.w2, into.w2_scale))
    wanted_e = torch.ones(1, dtype=torch.int32, device=into.w13.device)
    if not into.w13.is_cuda:
        convert_fp4(weights, wanted_e, tuple(_block_scaled(*place) for place in places))
        return
    made = tuple(_room(one) for one in weights)
    convert_fp4(weights, wanted_e, made)
    for one, (codes, scales) in zip(made, places, strict=True):
        codes[0].copy_(marlin_library.repacked(one.codes[0]))
        marlin_library.permute(one.scales[0], scales[0])


def quantised(dispatch_output: Any) -> Any:
    """The received rows as `run` takes them, one for each selection, in a copy of its argument.

    Rows stay bfloat16. Takes no more of them than the host's counts say, without a sync.
    """
    ids_NK, counts_e = dispatch_output.topk_ids, dispatch_output.num_recv_tokens_per_expert
    num_taken, device = min(ids_NK.numel(), sum(counts_e)), ids_NK.device
    # Bytes sort fastest; experts of a rank are at most 128, and none comes last.
    keys = ids_NK.flatten().where(ids_NK.flatten() >= 0, len(counts_e)).to(torch.uint8)
    experts_T, order_T = (one[:num_taken] for one in keys.sort(stable=True))
    firsts = torch.arange(len(counts_e) + 1, dtype=torch.int32, device=device)
    begins = torch.searchsorted(experts_T.to(torch.int32), firsts)
    place = torch.zeros(ids_NK.numel(), dtype=torch.int32, device=device)
    place[order_T] = torch.arange(num_taken, dtype=torch.int32, device=device)
    rows = ExpertRows(
        rows_SH=in_bfloat16(dispatch_output.hidden_states)[order_T // ids_NK.shape[1]],
        num_rows_e=begins.diff().to(torch.int32),
        room=0,
        mean=num_taken / len(counts_e),
        place_NK=place.view(ids_NK.shape),
    )
    return dispatch_output._replace(hidden_states=rows)


def quantised_masked(dispatch_output: Any) -> Any:
    """As `quantised`, of a low-latency dispatch: the rows where they lie."""
    rows_eMH = in_bfloat16(dispatch_output.hidden_states)
    rows = ExpertRows(
        rows_SH=rows_eMH.flatten(0, 1),
        num_rows_e=dispatch_output.masked_m,
        room=rows_eMH.shape[1],
        mean=dispatch_output.expected_m,
        place_NK=None,
    )
    return dispatch_output._replace(hidden_states=rows)


def run(layer: Any, dispatch_output: Any, weights: MarlinWeights) -> Any:
    """The experts of `layer` on rows from `quantised` or `quantised_masked`.

    bfloat16 rows out; in low latency those that no expert has are not defined. No host sync, and
    the same bits in every call with the same rows in the same places.
    """
    given: ExpertRows = dispatch_output.hidden_states
    run_rows = _run_on_gpu if given.rows_SH.is_cuda else _run_on_host
    down_SH = run_rows(given, weights)
    if given.place_NK is None:
        rows = down_SH.view(len(given.num_rows_e), given.room, -1)
    else:
        add = marlin_library.summed if down_SH.is_cuda else _summed
        rows = add(
            down_SH, dispatch_output.topk_ids, dispatch_output.topk_weights, given.place_NK
        )
    return to_combine(dispatch_output, rows)


def to_combine(dispatch_output: Any, rows: torch.Tensor) -> Any:
    """SGLang's input of the combine that follows this dispatch."""
    from sglang.srt.layers.moe.token_dispatcher.deepep import (
        DeepEPLLCombineInput,
        DeepEPNormalCombineInput,
    )

    is_masked = dispatch_output.format.is_deepep_ll()
    made = DeepEPLLCombineInput if is_masked else DeepEPNormalCombineInput
    return made(rows, dispatch_output.topk_ids, dispatch_output.topk_weights)


def block_of(mean: float) -> int:
    """Rows of a block where an expert has `mean` of them: the fewest that hold most experts'."""
    return next((one for one in BLOCKS if mean < FULL_ENOUGH * one), BLOCKS[-1])


def _run_on_gpu(given: ExpertRows, weights: MarlinWeights) -> torch.Tensor:
    block = block_of(given.mean)
    blocks = lay_blocks(
        given.num_rows_e, num_rows=len(given.rows_SH), room=given.room, block=block
    )
    return marlin_library.run_marlin(
        given.rows_SH,
        given.num_rows_e,
        blocks,
        block=block,
        room=given.room,
        w13=(weights.w13, weights.w13_scale),
        w2=(weights.w2, weights.w2_scale),
    )


def _run_on_host(given: ExpertRows, weights: MarlinWeights) -> torch.Tensor:
    numbers = given.num_rows_e.tolist()
    groups = torch.full((len(given.rows_SH),), -1, dtype=torch.int32)
    begin = 0
    for expert, count in enumerate(numbers):
        begin = expert * given.room if given.room else begin
        groups[begin : begin + count] = expert
        begin += count
    gate_up_SJ = grouped_fp4(given.rows_SH, _block_scaled(weights.w13, weights.w13_scale), groups)
    gate_SI, up_SI = gate_up_SJ.float().chunk(2, dim=1)
    act_SI = (F.silu(gate_SI) * up_SI).bfloat16()
    return grouped_fp4(act_SI, _block_scaled(weights.w2, weights.w2_scale), groups)


def _summed(
    rows_SH: torch.Tensor,
    ids_NK: torch.Tensor,
    weights_NK: torch.Tensor,
    place_NK: torch.Tensor,
) -> torch.Tensor:
    """`marlin_library.summed` on the host."""
    out_NH = torch.zeros(len(ids_NK), rows_SH.shape[1])
    for column in range(ids_NK.shape[1]):
        is_here_N = ids_NK[:, column] >= 0
        part_NH = rows_SH[place_NK[is_here_N, column].long()].float()
        out_NH[is_here_N] += part_NH * weights_NK[is_here_N, column, None].float()
    return out_NH.bfloat16()


def _room(weight: torch.Tensor) -> BlockScaled:
    """Room for codes and scales of `weight` row by row, not set."""
    num_experts, num_rows, width = weight.shape
    codes, scales = (
        weight.new_empty(num_experts, num_rows, width // part, dtype=torch.uint8)
        for part in (2, GROUP)
    )
    return _block_scaled(codes, scales)


def _block_scaled(codes: torch.Tensor, scales: torch.Tensor) -> BlockScaled:
    """Bytes row by row as their format."""
    return BlockScaled(format=FORMAT, codes=codes, scales=scales)
