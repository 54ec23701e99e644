"""Laws of the reference experts, against a loop over rows.

Shapes: N rows, K top-k columns, H hidden size, e local experts, I intermediate size.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from sglang_moelb.ep.standin.experts import run_experts

H, I, E_LOCAL = 16, 24, 4  # noqa: E741


def _weights(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    w13 = torch.randn(E_LOCAL, 2 * I, H, generator=generator, dtype=torch.float64)
    w2 = torch.randn(E_LOCAL, H, I, generator=generator, dtype=torch.float64)
    return (0.2 * w13).to(dtype), (0.2 * w2).to(dtype)


def _by_rows(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    w13, w2 = _weights()
    out = torch.zeros(x.shape, dtype=torch.float64)
    for row in range(x.shape[0]):
        for expert, weight in zip(ids[row].tolist(), weights[row].tolist(), strict=True):
            if expert >= 0:
                hidden = w13[expert] @ x[row].double()
                out[row] += weight * (w2[expert] @ (F.silu(hidden[:I]) * hidden[I:]))
    return out


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "ids",
    [
        [[0, 1], [2, 3], [-1, 3]],
        [[-1, -1], [-1, -1]],
        [[3, -1]] * 50,
        [[0, 1, 2, 3]] * 5,
        [[1, 1], [0, 0]],
    ],
    ids=["mixed", "none", "one-expert", "all", "duplicates"],
)
def test_every_selection_counts_with_its_weight(
    ids: list[list[int]], ids_dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(1)
    ids_NK = torch.tensor(ids, dtype=ids_dtype)
    x = torch.randn(len(ids), H, generator=generator)
    weights = torch.rand(ids_NK.shape, generator=generator)
    out = run_experts(x, ids_NK, weights, *_weights(torch.float32))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), _by_rows(x, ids_NK, weights), atol=1e-5, rtol=1e-5)


def test_no_rows_give_no_rows() -> None:
    empty = torch.zeros(0, 2)
    out = run_experts(torch.zeros(0, H), empty.to(torch.int64), empty, *_weights(torch.float32))
    assert out.shape == (0, H)


def test_a_row_without_a_local_expert_gives_zero() -> None:
    out = run_experts(
        torch.ones(1, H), torch.tensor([[-1]]), torch.ones(1, 1), *_weights(torch.float32)
    )
    assert not out.any()


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(KeyError, match="relu"):
        run_experts(
            torch.ones(1, H), torch.zeros(1, 1).long(), torch.ones(1, 1), *_weights(), "relu"
        )
