"""What tests and benchmarks of kernels share: routings, comparison with coordinates, GPU timing.

Shape letters: T tokens, C columns.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_moelb.kernels.row_layout import AMOUNT_ONE, FLAG_PROTECTED, FLAG_VISION

# Largest |out - ref| / max(1, |ref|) by format: integers are exact, floats get some ulps of sums.
TOLERANCES: dict[torch.dtype, float] = {
    torch.bool: 0.0,
    torch.uint8: 0.0,
    torch.int32: 0.0,
    torch.int64: 0.0,
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 1e-2,
}
MAX_SHOWN = 5


def assert_close(name: str, ref: Tensor, out: Tensor, tolerance: float | None = None) -> None:
    """AssertionError with the first bad coordinates unless `out` equals `ref` within tolerance.

    Args:
        name: what is compared, for the message.
        ref, out: tensors of one shape and dtype, on any device.
        tolerance: largest |out - ref| / max(1, |ref|); by default that of the dtype. 0 asks for
            the same values, NaN equal to NaN.
    """
    if ref.shape != out.shape or ref.dtype != out.dtype:
        raise AssertionError(
            f"{name}: expected {ref.dtype} {tuple(ref.shape)}, got {out.dtype} {tuple(out.shape)}"
        )
    tolerance = TOLERANCES[ref.dtype] if tolerance is None else tolerance
    ref, out = ref.detach().cpu(), out.detach().cpu()
    wide_ref, wide_out = ref.double(), out.double()
    # float64 holds no int64 exactly, so equality is asked of the tensors themselves.
    bad = (ref != out) & ~(wide_ref.isnan() & wide_out.isnan())
    if tolerance > 0:
        error = (wide_out - wide_ref).abs() / wide_ref.abs().clamp(min=1)
        bad &= ~(error <= tolerance)
    if not bad.any():
        return
    shown = [
        f"{tuple(at)}: expected {ref[tuple(at)].item()}, got {out[tuple(at)].item()}"
        for at in bad.nonzero()[:MAX_SHOWN].tolist()
    ]
    raise AssertionError(
        f"{name}: {int(bad.sum())} of {bad.numel()} differ by more than {tolerance}; "
        + "; ".join(shown)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Device times of one call, in microseconds, over `num_calls` calls."""

    median_us: float
    p10_us: float
    p90_us: float
    num_calls: int


def bench(call: Callable[[], object], *, num_calls: int = 100, num_warmup: int = 10) -> Timing:
    """Time `call` on the current CUDA device, each time with a cold L2.

    Before every call a buffer larger than any L2 is overwritten; the time between two CUDA events
    around the call is taken after all calls are queued, so launches of the host are hidden only
    where the flush is longer than they are (it is: about 100 us).

    Raises:
        RuntimeError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("bench() times CUDA events, and there is no CUDA device here")
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    for _ in range(num_warmup):
        call()
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(num_calls)
    ]
    for start, end in events:
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    times_us = sorted(start.elapsed_time(end) * 1e3 for start, end in events)
    return Timing(
        median_us=statistics.median(times_us),
        p10_us=times_us[num_calls // 10],
        p90_us=times_us[num_calls * 9 // 10],
        num_calls=num_calls,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """Inputs of the kernels: ids_TC int64 or int32, weights_TC float32, flags_T uint8, amounts_T."""

    ids_TC: Tensor
    weights_TC: Tensor
    flags_T: Tensor
    amounts_T: Tensor | None


def random_routing(
    num_tokens: int,
    num_columns: int,
    num_experts: int,
    seed: int,
    *,
    skew: float = 1.0,
    weighted: bool = False,
    padding_share: float = 0.1,
    missing_share: float = 0.1,
    vision_share: float = 0.5,
    protected_share: float = 0.1,
    device: str = "cpu",
) -> Routing:
    """A routing whose expert popularity falls as exp(-skew * rank of popularity / 8).

    Distinct experts a token, best weight first, weights of a token sum to 1; whole rows of padding
    and single missing entries are -1 with weight 0. Equal for equal arguments.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    popularity = -skew * torch.arange(num_experts)[torch.randperm(num_experts, generator=generator)]
    noise = -(-uniform(num_tokens, num_experts).clamp(1e-9, 1 - 1e-7).log()).log()
    logits, ids_TC = (noise + popularity / 8).topk(num_columns, dim=1)
    weights_TC = logits.softmax(dim=1)
    missing_TC = uniform(num_tokens, num_columns) < missing_share
    missing_TC |= (uniform(num_tokens) < padding_share)[:, None]
    flags_T = (uniform(num_tokens) < vision_share).int() * FLAG_VISION
    flags_T += (uniform(num_tokens) < protected_share).int() * FLAG_PROTECTED
    amounts_T = None
    if weighted:
        amounts_T = torch.randint(1, AMOUNT_ONE + 1, (num_tokens,), generator=generator)
        amounts_T = amounts_T.where((flags_T & FLAG_VISION) != 0, AMOUNT_ONE).int().to(device)
    return Routing(
        ids_TC=ids_TC.masked_fill(missing_TC, -1).to(device),
        weights_TC=weights_TC.masked_fill(missing_TC, 0.0).to(device),
        flags_T=flags_T.to(device, torch.uint8),
        amounts_T=amounts_T,
    )
