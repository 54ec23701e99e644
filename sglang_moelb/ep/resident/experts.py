"""Resident copies while serving: ids are mapped before every dispatch, experts run from two stores.

Driven by SGLang's serving thread, in prefill and decode alike. A CUDA graph of decode holds the
addresses of the maps and of all weights, so they stay where they are.

Shape letters: T tokens, K top-k, N received rows, H hidden size, L MoE layers, E logical experts,
C most copies of an expert, B bounds of its copies' shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from sglang_moelb.controller.split import MOST_SHARED, Split, bounds_of
from sglang_moelb.ep.expert_rows import dispose, in_dtype
from sglang_moelb.ep.resident.formats import format_of
from sglang_moelb.ep.resident.masked import run_masked
from sglang_moelb.ep.resident.weights import StoredLayer
from sglang_moelb.kernels.choose_copy import choose_copy
from sglang_moelb.placement import LayerLayout

MOST_TOLD = 64  # experts whose shares the status shows

if TYPE_CHECKING:
    from sglang_moelb.ep.resident.move import Mover


class ResidentExperts:
    """The MoE layers `layers` of this rank as a placement has stored them.

    `mover` moves their replicas while serving, where that was asked for.
    """

    mover: Mover | None = None

    def __init__(
        self,
        layers: Sequence[Any],
        stored_L: Sequence[StoredLayer],
        layouts_L: Sequence[LayerLayout],
        *,
        rank: int,
    ) -> None:
        self._stored = {id(layer): stored for layer, stored in zip(layers, stored_L, strict=True)}
        self._rank = rank
        device = layers[0].w13_weight.device
        self._copies_L = [
            torch.tensor(layout.copies_EC, dtype=torch.int32, device=device)
            for layout in layouts_L
        ]
        self._num_copies_L = [
            torch.tensor(layout.num_copies_E, dtype=torch.int32, device=device)
            for layout in layouts_L
        ]
        self._counts_L = [layout.num_copies_E.tolist() for layout in layouts_L]
        self._shares: dict[tuple[int, int], tuple[int, ...]] = {}
        shape = len(layouts_L[0].num_copies_E), MOST_SHARED - 1
        self._bounds_L = [torch.zeros(shape, dtype=torch.int32, device=device) for _ in layouts_L]

    def physical(self, layer: int, topk_output: Any) -> Any:
        """`topk_output` with each row's expert replaced by the copy that is to compute it."""
        ids_TK = choose_copy(
            topk_output.topk_ids,
            self._copies_L[layer],
            self._num_copies_L[layer],
            self._bounds_L[layer],
            shift=self._rank,
        )
        return topk_output._replace(topk_ids=ids_TK)

    def send_to(self, layer: int, expert: int, physical: Sequence[int]) -> None:
        """Send rows of `expert` evenly to the copies with these ids, its original first.

        Written in place, on the current stream, without a sync: a captured graph reads it too.
        """
        copies_EC, num_copies_E = self._copies_L[layer], self._num_copies_L[layer]
        row = [*physical, *(-1,) * (copies_EC.shape[1] - len(physical))]
        for to, values in (
            (copies_EC[expert], row),
            (num_copies_E[expert : expert + 1], [len(physical)]),
        ):
            _write(to, values)
        self._counts_L[layer][expert] = len(physical)
        self.share(Split(layer=layer, expert=expert, shares=()))

    def share(self, split: Split) -> None:
        """Split rows of an expert by shares of its copies, or evenly where there are none.

        Not where it has another number of copies. Written like the maps, see `send_to`.
        """
        if split.is_of_all:
            self._shares.clear()
            for bounds_EB in self._bounds_L:
                bounds_EB.zero_()
            return
        at, shares = (split.layer, split.expert), split.shares
        if len(shares) not in (0, self._counts_L[split.layer][split.expert]):
            return
        self._shares.pop(at, None)
        if shares:
            self._shares[at] = shares
        _write(self._bounds_L[split.layer][split.expert], bounds_of(shares))

    def told(self) -> dict[str, Any]:
        """Shares for the status, plain JSON types: of MOST_TOLD experts at most."""
        told = [
            {"layer": layer, "expert": expert, "shares": list(shares)}
            for (layer, expert), shares in sorted(self._shares.items())[:MOST_TOLD]
        ]
        return {"num_shared": len(self._shares), "shares": told}

    def run(self, module: Any, dispatch_output: Any) -> Any:
        """Run a layer's experts: at most one grouped run a precision, their rows added.

        In low latency the same in another layout, see `ep.resident.masked`. Else a row of several
        local experts, some high and some low, is the sum of both runs' shares.
        """
        stored = self._stored[id(module)]
        if dispatch_output.format.is_deepep_ll():
            return run_masked(module, dispatch_output, stored)
        counts = dispatch_output.num_recv_tokens_per_expert
        high, low = counts[: stored.num_high], counts[stored.num_high :]
        if stored.low is None or not any(low):
            # Places behind the high ones got no row, so their ids do not occur.
            return _run_high(module, dispatch_output._replace(num_recv_tokens_per_expert=high))
        dtype, rows_NH = dispatch_output.hidden_states.dtype, dispatch_output.hidden_states
        ids_NK = dispatch_output.topk_ids
        low_format = format_of(stored.low)
        low_output = low_format.quantised(
            dispatch_output._replace(
                topk_ids=(ids_NK - stored.num_high).clamp(min=-1), num_recv_tokens_per_expert=low
            )
        )
        if not any(high):
            dispose(rows_NH)
            low_done = in_dtype(low_format.run(module, low_output, stored.low), dtype)
            return low_done._replace(topk_ids=ids_NK)
        high_ids_NK = ids_NK.where(ids_NK < stored.num_high, -1)
        done = _run_high(
            module,
            dispatch_output._replace(topk_ids=high_ids_NK, num_recv_tokens_per_expert=high),
        )
        added = in_dtype(low_format.run(module, low_output, stored.low), dtype)
        rows_NH = done.hidden_states + added.hidden_states
        return added._replace(hidden_states=rows_NH, topk_ids=ids_NK)


def _write(to: torch.Tensor, values: Sequence[int]) -> None:
    # Pinned, or the copy would wait for the device.
    new = torch.tensor(values, dtype=torch.int32, pin_memory=to.is_cuda)
    to.copy_(new, non_blocking=True)


def _run_high(module: Any, dispatch_output: Any) -> Any:
    return module.quant_method.apply(layer=module, dispatch_output=dispatch_output)
