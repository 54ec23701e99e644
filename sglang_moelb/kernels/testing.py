"""What tests and benchmarks of kernels share: routings, comparison with coordinates, GPU timing.

Shape letters: T tokens, C columns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_moelb.kernels.row_layout import AMOUNT_ONE, FLAG_PROTECTED, FLAG_REFUSED, FLAG_VISION

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
FLUSH_BYTES = 512 << 20  # ten L2s of an H100, and 200 us of writing: longer than our launches


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
    """Times of one call over `num_calls` calls, in microseconds.

    The first three are on the device, or on the host where the call runs there; `host_us` is what
    the host spends until the call returns.
    """

    median_us: float
    p10_us: float
    p90_us: float
    host_us: float
    num_calls: int


def bench(call: Callable[[], object], *, num_calls: int = 100, num_warmup: int = 10) -> Timing:
    """Time `call` on the current CUDA device with a cold L2, or on the host without one.

    On a device, a buffer larger than any L2 is overwritten before every call, which also gives the
    host time to queue the call; two CUDA events around it give its time, which includes the gaps
    between its launches. The host's time is taken apart, without flushes.
    """
    for _ in range(num_warmup):
        call()
    if not torch.cuda.is_available():
        times_us = _host_times(call, num_calls)
        return _timing(times_us, statistics.median(times_us))
    torch.cuda.synchronize()
    host_us = statistics.median(_host_times(call, num_calls))
    torch.cuda.synchronize()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
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
    return _timing([start.elapsed_time(end) * 1e3 for start, end in events], host_us)


def _host_times(call: Callable[[], object], num_calls: int) -> list[float]:
    times_us = []
    for _ in range(num_calls):
        start_s = time.perf_counter()
        call()
        times_us.append((time.perf_counter() - start_s) * 1e6)
    return times_us


def _timing(times_us: list[float], host_us: float) -> Timing:
    ordered = sorted(times_us)
    return Timing(
        median_us=statistics.median(ordered),
        p10_us=ordered[len(ordered) // 10],
        p90_us=ordered[len(ordered) * 9 // 10],
        host_us=host_us,
        num_calls=len(ordered),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """Inputs of the kernels: ids int64 or int32, weights float32, flags uint8, amounts int32."""

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
    and single missing entries are -1 with weight 0. Of the protected tokens about half are refused.
    Equal for equal arguments.
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
    drawn_T = uniform(num_tokens)
    flags_T += (drawn_T < protected_share).int() * FLAG_PROTECTED
    flags_T += (drawn_T < protected_share / 2).int() * FLAG_REFUSED
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
