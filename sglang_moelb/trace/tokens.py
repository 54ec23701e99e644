"""Traces of tokens: the routing of every row of a rank in sampled passes, written and read.

A file is like one of passes, with frames of kind TOKENS. Ids are stored as one more than they are,
so that -1, no expert, is 0, and weights as the bits of float16, both as byte planes (`codec`).

Shape letters: L MoE layers, T rows of one rank, K top-k.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from sglang_moelb.config import Config
from sglang_moelb.trace import codec
from sglang_moelb.trace.files import TraceFiles, decoded, open_files
from sglang_moelb.trace.frames import Kind
from sglang_moelb.trace.types import TOKENS, PendingTokens, TokenPass
from sglang_moelb.trace.writer import MAX_FILE_BYTES, FrameWriter
from sglang_moelb.types import Topology

IS_VISION, IS_PROTECTED = 1, 2


class _TokensPayload(msgspec.Struct, frozen=True, kw_only=True):
    step: int
    lever: str
    num_rows: int
    ids: bytes  # [L, T, K] as planes of id + 1
    weights: bytes  # [L, T, K] as planes of the bits of float16
    flags: bytes  # [T] uint8: IS_VISION, IS_PROTECTED
    num_missed: int = 0


class TokenWriter(FrameWriter):
    """Appends sampled passes of one rank; see `FrameWriter`."""

    def __init__(
        self,
        folder: Path,
        *,
        topology: Topology,
        rank: int,
        config: Config,
        every: int,
        max_file_bytes: int = MAX_FILE_BYTES,
    ) -> None:
        super().__init__(
            folder,
            contents=TOKENS,
            topology=topology,
            rank=rank,
            config=config,
            source=f"live, one prefill pass of {every}",
            max_file_bytes=max_file_bytes,
        )

    def add(self, pending: PendingTokens) -> None:
        """Append one pass once it is on the host; does nothing once the trace has stopped."""
        if self.stopped:
            return
        try:
            payload = encode_tokens(pending.build(), pending.num_missed, self.header.topology)
        except ValueError as error:
            self.give_up(str(error))
        else:
            self.num_passes += self.append(Kind.TOKENS, payload)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenTrace(TraceFiles):
    """A trace of tokens that was found to begin rightly."""

    def passes(self) -> Iterator[TokenPass]:
        """The sampled passes in order, up to the last that was written whole.

        Raises `TraceError` where a file is damaged or does not belong to the others.
        """
        for path, frame in self.frames():
            if frame.kind == Kind.TOKENS:
                yield decoded(path, frame, self._pass)

    def _pass(self, payload: bytes) -> TokenPass:
        return decode_tokens(payload, self.header.topology)


def open_tokens(path: Path, rank: int | None = None) -> TokenTrace:
    """The trace of tokens at `path`, of `rank` or else of the lowest rank there.

    Raises `TraceError` if there is none, or it is of another schema or a later version.
    """
    header, files = open_files(path, TOKENS, rank)
    return TokenTrace(header=header, files=files)


def encode_tokens(tokens: TokenPass, num_missed: int, topology: Topology) -> bytes:
    """The payload of a sampled pass. Raises `ValueError` where it is not one of `topology`."""
    shape = (topology.num_layers, len(tokens.is_vision_T), topology.topk)
    for name in ("ids_LTK", "weights_LTK"):
        found = getattr(tokens, name).shape
        if found != shape:
            raise ValueError(f"pass {tokens.step}: {name} is {found}, expected {shape}")
    flags_T = tokens.is_vision_T * IS_VISION + tokens.is_protected_T * IS_PROTECTED
    payload = _TokensPayload(
        step=tokens.step,
        lever=tokens.lever,
        num_rows=shape[1],
        ids=codec.to_planes(tokens.ids_LTK.astype(np.int32) + 1),
        weights=codec.to_planes(tokens.weights_LTK.view(np.uint16)),
        flags=flags_T.astype(np.uint8).tobytes(),
        num_missed=num_missed,
    )
    return zlib.compress(msgspec.msgpack.encode(payload), codec.COMPRESSION)


def decode_tokens(payload: bytes, topology: Topology) -> TokenPass:
    """Inverse of `encode_tokens`. Raises `ValueError`."""
    found = codec.decode_payload(payload, _TokensPayload)
    shape = (topology.num_layers, found.num_rows, topology.topk)
    ids_LTK = codec.from_planes(found.ids, shape) - 1
    if len(found.flags) != found.num_rows:
        raise ValueError(f"{len(found.flags)} flags of {found.num_rows} rows")
    if ids_LTK.size and int(ids_LTK.max()) >= topology.num_experts:
        raise ValueError(f"expert {ids_LTK.max()} of {topology.num_experts}")
    flags_T = np.frombuffer(found.flags, np.uint8)
    weights_LTK = codec.from_planes(found.weights, shape).astype(np.uint16).view(np.float16)
    return TokenPass(
        step=found.step,
        lever=found.lever,
        ids_LTK=ids_LTK.astype(np.int16),
        weights_LTK=weights_LTK,
        is_vision_T=(flags_T & IS_VISION) != 0,
        is_protected_T=(flags_T & IS_PROTECTED) != 0,
        num_missed=found.num_missed,
    )
