"""The routing of every row of sampled passes, on its way from the hot path to a rank's own file.

A pass that is not sampled costs one comparison a layer. In a sampled one the router's tensors are
kept until the pass ends; then they are stacked and copied to pinned memory on the stream, and the
writer's thread waits for them, so the serving thread never does.

Shape letters: L MoE layers, T rows of this rank, K top-k.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from sglang_moelb.config import Config, trace_folder, trace_tokens
from sglang_moelb.ep.records import PassLog
from sglang_moelb.ep.seat import Seat
from sglang_moelb.kernels.row_layout import FLAG_PROTECTED, FLAG_VISION
from sglang_moelb.trace.background import BackgroundWriter
from sglang_moelb.trace.tokens import TokenWriter
from sglang_moelb.trace.types import PendingTokens, TokenPass, TraceError, TraceStats

MAX_PENDING = 4  # passes of up to some 20 MB of pinned memory each


class TokenTrace:
    """Takes sampled passes of one rank; for the serving thread."""

    def __init__(self, writer: TokenWriter, every: int, device: torch.device) -> None:
        self.every = every
        self._device = device
        self.background = BackgroundWriter(writer, MAX_PENDING)

    @property
    def stats(self) -> TraceStats:
        """What has been written up to here."""
        return self.background.stats

    def add(self, log: PassLog, flags_T: torch.Tensor) -> None:
        """Start the copies of a sampled pass and hand them over; no host sync."""
        if not self.background.has_room():
            return
        assert log.tokens_L is not None
        ids_LTK = torch.stack([ids_TK for ids_TK, _ in log.tokens_L]).to(torch.int16)
        weights_LTK = torch.stack([weights_TK for _, weights_TK in log.tokens_L]).half()
        copies = [_to_host(tensor) for tensor in (ids_LTK, weights_LTK, flags_T.clone())]
        copied = torch.cuda.Event() if self._device.type == "cuda" else None
        if copied:
            copied.record()
        step, lever = log.step, log.lever.name.lower()
        self.background.add(PendingTokens(build=lambda: _built(step, lever, copies, copied)))

    def close(self) -> None:
        """Write what was handed over."""
        self.background.close()


def token_trace_of(seat: Seat, config: Config) -> TokenTrace | None:
    """The trace of tokens that was asked for; ends the process where it cannot be written."""
    every = trace_tokens()
    if not every:
        return None
    try:
        writer = TokenWriter(
            Path(trace_folder()),
            topology=seat.topology,
            rank=seat.rank,
            config=config,
            every=every,
        )
    except TraceError as error:
        sys.exit(f"sglang_moelb: --moelb-trace-tokens: {error}")
    return TokenTrace(writer, every, seat.device)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """On CUDA a copy on its way to pinned memory, on CPU the tensor itself."""
    if not tensor.is_cuda:
        return tensor
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


def _built(
    step: int, lever: str, copies: list[torch.Tensor], copied: torch.cuda.Event | None
) -> TokenPass:
    """The pass on the host; waits for the device, so only in the writer's thread."""
    if copied:
        copied.synchronize()
    ids_LTK, weights_LTK, flags_T = (copy.numpy() for copy in copies)
    return TokenPass(
        step=step,
        lever=lever,
        ids_LTK=ids_LTK,
        weights_LTK=weights_LTK,
        is_vision_T=(flags_T & FLAG_VISION) != 0,
        is_protected_T=(flags_T & FLAG_PROTECTED) != 0,
    )
