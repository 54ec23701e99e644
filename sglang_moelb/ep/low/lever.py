"""The lever downgrade in a layer: convert under the dispatch, then run at low precision.

Driven by SGLang's serving thread. Shape letters: E logical experts, e local experts of this rank,
N received rows, H hidden size,
K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sglang_moelb.ep.expert_rows import dispose, in_dtype
from sglang_moelb.ep.low.flags import HostFlags
from sglang_moelb.ep.low.formats import LowFormat, LowWeights
from sglang_moelb.ep.low.staging import Staging


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A layer whose rows are on their way, and its plan for this rank's experts on the device."""

    layer: int
    wanted_e: torch.Tensor


class DowngradeLever:
    """Applies plans to the MoE layers `layers` of this rank, in the order of a forward pass."""

    def __init__(
        self, layers: Sequence[Any], rank: int, staging: Staging, flags: HostFlags
    ) -> None:
        self._layers = layers
        self._staging = staging
        self._flags = flags
        num_local = len(layers[0].w13_weight)
        self._mine = slice(rank * num_local, (rank + 1) * num_local)
        self._asked: Asked | None = None
        self._num_low_layers = 0

    def told(self) -> dict[str, int | str]:
        """For the status: what this rank has done, and how often it had to wait for a plan."""
        return {
            "format": self._staging.low_format.NAME,
            "num_low_layers": self._num_low_layers,
            "num_host_waits": self._flags.num_waits,
        }

    def prepare(self, layer: int, low_E: torch.Tensor) -> None:
        """Before the dispatch of `layer`: start its conversion, and the plan's way to the host."""
        asked = Asked(layer=layer, wanted_e=low_E[self._mine])
        self._flags.send(asked.wanted_e)
        self._staging.convert(layer, asked.wanted_e)
        self._asked = asked

    def run(self, module: Any, dispatch_output: Any) -> Any:
        """Run the experts of the layer that was prepared; None where SGLang is to run them.

        The main lane waits for the conversion in any case, so that nothing of the plan is freed
        while the side lane reads it.
        """
        asked, self._asked = self._asked, None
        if asked is None or module is not self._layers[asked.layer]:
            return None
        weights = self._staging.ready(asked.layer)
        low_e = self._flags.read()
        counts_e = dispatch_output.num_recv_tokens_per_expert
        if not any(n for n, low in zip(counts_e, low_e, strict=True) if low):
            return None
        self._num_low_layers += 1
        combine_input = _run(
            module, dispatch_output, self._staging.low_format, weights, asked.wanted_e, low_e
        )
        self._staging.done(asked.layer)
        return combine_input

    def forget(self) -> None:
        """A pass has ended."""
        self._asked = None


def _run(
    module: Any,
    dispatch_output: Any,
    low_format: LowFormat,
    weights: LowWeights,
    wanted_e: torch.Tensor,
    low_e: NDArray[np.bool_],
) -> Any:
    """Low experts at low precision, the others as SGLang runs them; rows of both are summed."""
    dtype, rows_NH = dispatch_output.hidden_states.dtype, dispatch_output.hidden_states
    ids_NK = dispatch_output.topk_ids
    low_output = low_format.quantised(dispatch_output)
    counts_e = dispatch_output.num_recv_tokens_per_expert
    if not any(n for n, low in zip(counts_e, low_e, strict=True) if not low):
        dispose(rows_NH)
        return in_dtype(low_format.run(module, low_output, weights), dtype)
    is_low_NK = (ids_NK >= 0) & (wanted_e != 0)[ids_NK.clamp(min=0)]
    high = module.quant_method.apply(
        layer=module, dispatch_output=_only(dispatch_output, ~is_low_NK, ~low_e)
    )
    low = in_dtype(low_format.run(module, _only(low_output, is_low_NK, low_e), weights), dtype)
    return high._replace(hidden_states=high.hidden_states + low.hidden_states, topk_ids=ids_NK)


def _only(dispatch_output: Any, kept_NK: torch.Tensor, kept_e: NDArray[np.bool_]) -> Any:
    """`dispatch_output` as if no row had come for other experts than those kept."""
    counts_e = dispatch_output.num_recv_tokens_per_expert
    return dispatch_output._replace(
        topk_ids=dispatch_output.topk_ids.where(kept_NK, -1),
        num_recv_tokens_per_expert=[n if k else 0 for n, k in zip(counts_e, kept_e, strict=True)],
    )
