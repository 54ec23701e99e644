"""What the checks of fp8 on a CUDA device share: inputs, and equality of codes.

Shape letters: T rows, H features, N output features, K input features, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

UNTOUCHED = 0x5A
INF, NAN = float("inf"), float("nan")


@contextmanager
def no_host_sync() -> Iterator[None]:
    """RuntimeError if torch waits for the device inside."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_same_fp8(name: str, expected: Tensor, out: Tensor) -> None:
    """The same codes, any NaN being equal to any."""
    expected, out = expected.to(out.device), out
    assert expected.shape == out.shape, f"{name}: {expected.shape} and {out.shape}"
    assert expected.dtype == out.dtype == torch.float8_e4m3fn, f"{name}: {out.dtype}"
    bad = expected.view(torch.uint8) != out.view(torch.uint8)
    bad &= ~(expected.float().isnan() & out.float().isnan())
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: {int(bad.sum())} of {bad.numel()} codes differ, first at {at}: expected "
            f"{expected[at].float().item()}, got {out[at].float().item()}"
        )


def make_weights(
    num_experts: int, shapes: tuple[tuple[int, int], ...], *, special: bool
) -> list[Tensor]:
    """Random weights on the device; `special` puts NaN, Inf, zeros and extremes in."""
    weights = []
    for rows, columns in shapes:
        weight_ENK = torch.randn(num_experts, rows, columns, device="cuda").bfloat16()
        weight_ENK *= torch.logspace(-5, 2, num_experts, device="cuda")[:, None, None].bfloat16()
        if special:
            weight_ENK[0, 0, 0], weight_ENK[-1, -1, -1], weight_ENK[-1, 0, -1] = NAN, INF, -INF
            weight_ENK[num_experts // 2, : rows // 2] = 0
            weight_ENK[num_experts // 2, -1] = 3e38
            weight_ENK[num_experts // 3] *= 2.0**-40
        weights.append(weight_ENK)
    return weights


def make_slots(weights: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and scales in which every byte is UNTOUCHED."""
    out, scales = [], []
    for weight in weights:
        blocks = (len(weight), *(-(-size // 128) for size in weight.shape[1:]))
        for slots, shape, dtype in (
            (out, weight.shape, torch.float8_e4m3fn),
            (scales, blocks, torch.float32),
        ):
            slot = torch.empty(shape, dtype=dtype, device="cuda")
            slot.view(torch.uint8).fill_(UNTOUCHED)
            slots.append(slot)
    return out, scales


def make_rows(num_rows: int, width: int, *, special: bool) -> Tensor:
    """Random rows on the device; `special` puts NaN, Inf, zeros and extremes in."""
    x_TH = torch.randn(num_rows, width, device="cuda").bfloat16()
    x_TH *= torch.logspace(-6, 3, max(num_rows, 1), device="cuda")[:num_rows, None].bfloat16()
    if special and num_rows > 8:
        x_TH[1, 3], x_TH[2, -1], x_TH[3, 0], x_TH[4] = NAN, INF, -INF, 0
        x_TH[5, :128], x_TH[6, 1], x_TH[7] = NAN, 3e38, 2.0**-100
    return x_TH
