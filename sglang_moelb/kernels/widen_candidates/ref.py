"""Reference of `widen_candidates` in plain torch.

Shape letters as in the package; X extra columns, J local experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_moelb.kernels.row_layout import FLAG_PROTECTED


def widen_candidates(
    ids_TK: Tensor,
    weights_TK: Tensor,
    scores_TE: Tensor,
    flags_T: Tensor,
    *,
    first_local: int,
    num_local: int,
    num_extra: int,
) -> tuple[Tensor, Tensor]:
    """See `sglang_moelb.kernels.widen_candidates`. Runs wherever its tensors are."""
    check_local(scores_TE.shape[1], first_local, num_local)
    scale_T = _scale(ids_TK, weights_TK, scores_TE)
    allowed_T = (scale_T > 0) & torch.isfinite(scale_T) & ((flags_T & FLAG_PROTECTED) == 0)
    local_TJ = scores_TE[:, first_local : first_local + num_local]
    local_J = torch.arange(first_local, first_local + num_local, device=ids_TK.device)
    chosen_TJ = (ids_TK[:, :, None] == local_J).any(dim=1)
    ranked_TJ = local_TJ.where((local_TJ > 0) & ~chosen_TJ & allowed_T[:, None], 0.0)
    best_TJ, place_TJ = ranked_TJ.sort(dim=1, descending=True, stable=True)
    best_TX = best_TJ[:, :num_extra]
    extra_TX = (place_TJ[:, :num_extra] + first_local).where(best_TX > 0, -1)
    extra_weights_TX = (best_TX * scale_T[:, None]).where(best_TX > 0, 0.0)
    missing = (0, num_extra - best_TX.shape[1])
    extra_TX = torch.nn.functional.pad(extra_TX, missing, value=-1)
    extra_weights_TX = torch.nn.functional.pad(extra_weights_TX, missing)
    ids_TC = torch.cat((ids_TK, extra_TX.to(ids_TK.dtype)), dim=1)
    return ids_TC, torch.cat((weights_TK, extra_weights_TX), dim=1)


def check_local(num_experts: int, first_local: int, num_local: int) -> None:
    """Raise ValueError if the local experts are not among the E experts. Host only."""
    if not 0 <= first_local <= first_local + num_local <= num_experts:
        raise ValueError(
            f"local experts {first_local}..{first_local + num_local - 1} are not all among the "
            f"{num_experts} that scores_TE has columns for"
        )


def _scale(ids_TK: Tensor, weights_TK: Tensor, scores_TE: Tensor) -> Tensor:
    """Gate weight per unit of router score, NaN where there is none."""
    first_T = ids_TK[:, 0].long()
    is_expert_T = (first_T >= 0) & (first_T < scores_TE.shape[1])
    score_T = scores_TE.gather(1, first_T.where(is_expert_T, 0)[:, None])[:, 0]
    return (weights_TK[:, 0] / score_T).where(is_expert_T & (score_T > 0), float("nan"))
