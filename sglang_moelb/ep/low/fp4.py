"""FP4 by emulation: the experts multiply the very values that FP4 weights and rows would have.

For quality, where the hardware has no FP4: slower than bfloat16. Rounds where a native path rounds:
rows before each GEMM, outputs of both GEMMs and the activation to bfloat16. No host sync.

Shape letters: e local experts of this rank, N received rows, K top-k, H hidden size,
J = 2I gate and up, I expert size, T selections, E local experts as the kernels name them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  torch's own spelling

from sglang_moelb.ep.expert_rows import in_bfloat16
from sglang_moelb.kernels.block_format import (
    BlockFormat,
    BlockScaled,
    empty_block_scaled,
    global_scales,
)
from sglang_moelb.kernels.convert_fp4 import convert_fp4
from sglang_moelb.kernels.grouped_fp4 import grouped_fp4
from sglang_moelb.kernels.quantise_rows_fp4 import quantise_rows_fp4


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp4Weights:
    """Both projections of a layer's local experts, `[e, J, H]` and `[e, H, I]`."""

    w13: BlockScaled
    w2: BlockScaled

    @property
    def num_bytes(self) -> int:
        """Memory of codes, scales and globals."""
        parts = (self.w13, self.w2)
        tensors = [t for one in parts for t in (one.codes, one.scales, one.globals)]
        return sum(t.nbytes for t in tensors if t is not None)


class EmulatedFp4:
    """A `LowFormat`: weights in one block format, rows in another."""

    def __init__(
        self, name: str, layers: Sequence[Any], *, weights: BlockFormat, rows: BlockFormat
    ) -> None:
        """NVFP4's globals are those of the weights at this moment, for each expert of `layers`."""
        self.NAME = name
        self._weights = weights
        self._rows = rows
        self._globals = {id(layer): self._globals_of(layer) for layer in layers}

    def allocate(self, layer: Any) -> Fp4Weights:
        """See `LowFormat`. Plain tensors, as in `fp8.allocate`."""
        w13, w2 = layer.w13_weight, layer.w2_weight
        return Fp4Weights(
            w13=empty_block_scaled(tuple(w13.shape), self._weights, w13.device),
            w2=empty_block_scaled(tuple(w2.shape), self._weights, w2.device),
        )

    def convert(
        self,
        layer: Any,
        into: Fp4Weights,
        wanted_e: torch.Tensor,
        num_programs: int | None = None,
    ) -> None:
        """See `LowFormat`. One launch for both projections, behind a copy of NVFP4's globals."""
        slots = (into.w13, into.w2)
        for slot, globals_e in zip(slots, self._globals[id(layer)], strict=True):
            if slot.globals is not None and globals_e is not None:
                slot.globals.copy_(globals_e)
        weights = (in_bfloat16(layer.w13_weight.data), in_bfloat16(layer.w2_weight.data))
        convert_fp4(weights, wanted_e, slots, num_programs=num_programs or 0)

    def quantised(self, dispatch_output: Any) -> Any:
        """See `LowFormat`: rows as `BlockScaled`, which a row's selections share."""
        rows = in_bfloat16(dispatch_output.hidden_states)
        return dispatch_output._replace(
            hidden_states=quantise_rows_fp4(rows, block_format=self._rows)
        )

    def run(self, layer: Any, dispatch_output: Any, weights: Fp4Weights) -> Any:
        """See `LowFormat`; bfloat16 rows, zero where a row has no expert of those it was sent for.

        Takes every selection in the order of its expert; as many as the host's counts allow for,
        of which those behind the last are padding.
        """
        from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPNormalCombineInput

        ids_NK = dispatch_output.topk_ids
        num_rows, num_columns = ids_NK.shape
        flat = ids_NK.flatten().where(ids_NK.flatten() >= 0, len(weights.w13.codes))
        num_taken = min(flat.numel(), sum(dispatch_output.num_recv_tokens_per_expert))
        order_T = flat.argsort(stable=True)[:num_taken]
        groups_T = ids_NK.flatten()[order_T].to(torch.int32).clamp(min=-1)
        rows = _taken(dispatch_output.hidden_states, order_T // num_columns)
        gate_up_TJ = grouped_fp4(rows, weights.w13, groups_T, decode=True)
        gate_TI, up_TI = gate_up_TJ.float().chunk(2, dim=1)
        act_TI = (F.silu(gate_TI) * up_TI).bfloat16()
        act = quantise_rows_fp4(act_TI, block_format=self._rows)
        down_TH = grouped_fp4(act, weights.w2, groups_T, decode=True)
        # Where a selection ended up; those of other ranks read any row and are left out below.
        place = torch.zeros_like(flat)
        place[order_T] = torch.arange(num_taken, device=flat.device)
        out_NH = torch.zeros(num_rows, down_TH.shape[1], device=flat.device)
        # Column by column, so that the order of the sum does not depend on the device's mood.
        for ids_N, place_N, weights_N in zip(
            ids_NK.T, place.view(num_rows, num_columns).T, dispatch_output.topk_weights.T,
            strict=True,
        ):  # fmt: skip
            if num_taken:
                part_NH = down_TH[place_N].float() * weights_N.float()[:, None]
                out_NH += part_NH.where((ids_N >= 0)[:, None], 0.0)
        return DeepEPNormalCombineInput(out_NH.bfloat16(), ids_NK, dispatch_output.topk_weights)

    def _globals_of(self, layer: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if not self._weights.has_global:
            return None, None
        w13, w2 = (
            torch.cat([global_scales(in_bfloat16(part[None])) for part in weight.data])
            for weight in (layer.w13_weight, layer.w2_weight)
        )
        return w13, w2


def _taken(rows: BlockScaled, index_T: torch.Tensor) -> BlockScaled:
    """The rows at `index_T`: a row's bytes do not depend on where it stands."""
    globals_T = None if rows.globals is None else rows.globals[index_T]
    return replace(rows, codes=rows.codes[index_T], scales=rows.scales[index_T], globals=globals_T)
