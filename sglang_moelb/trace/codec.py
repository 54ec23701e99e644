"""A pass as bytes and back, without loss: replay must give the very decisions of the run.

Integers are stored as byte planes (all lowest bytes, then the next), of which zlib finds the higher
ones nearly empty; times as they are, in float64.

Shape letters: L MoE layers, R ranks, E logical experts, M modalities (text, vision).
"""

from __future__ import annotations

import zlib
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from sglang_moelb.config import Config, parse
from sglang_moelb.trace.types import ConfigChange, Header, TracedPass
from sglang_moelb.types import (
    Decision,
    FloatArray,
    IntArray,
    Phase,
    Policy,
    RankReport,
    StepRecord,
    Topology,
)

COMPRESSION = 1  # of zlib; higher levels save 3 % and take three times as long
NUM_MODALITIES = 2


class _PassPayload(msgspec.Struct, frozen=True, kw_only=True):
    now_s: float
    step: int
    rank: int
    policy: Policy
    phase: Phase
    gate_reason: str
    num_tokens: list[int]
    num_vision_tokens: list[int]
    num_protected_tokens: list[int]
    rows: bytes  # [L, R, E, M] as planes
    rows_after: bytes  # [L, R] as planes
    experts_ms: bytes  # [L] float64
    layer_ms: bytes  # [L] float64
    routed_mass: float
    lost_mass: float
    moved_mass: float
    num_dropped_rows: int
    num_added_rows: int
    balance_ms: float
    step_ms: float
    decision: Decision | None = None
    num_missed: int = 0
    low_rows: bytes = b""  # [L, R] as planes; nothing where the lever downgrade did not act
    num_copies: bytes = b""  # the same under the lever replicate
    num_refused_tokens: list[int] | None = None  # None: not told apart from the other protected
    reports: tuple[RankReport, ...] = ()


def encode_header(header: Header) -> bytes:
    """The payload of a header frame."""
    return zlib.compress(msgspec.msgpack.encode(header), COMPRESSION)


def decode_header(payload: bytes) -> Header:
    """Inverse of `encode_header`. Raises `ValueError`."""
    header: Header = decode_payload(payload, Header)
    return header


def encode_config(config: Config) -> bytes:
    """The payload of a change of configuration."""
    return zlib.compress(msgspec.msgpack.encode(msgspec.to_builtins(config)), COMPRESSION)


def decode_config(payload: bytes) -> ConfigChange:
    """Inverse of `encode_config`. Raises `ValueError`."""
    return ConfigChange(config=parse(decode_payload(payload, dict[str, Any])))


def encode_pass(traced: TracedPass, topology: Topology) -> bytes:
    """The payload of a pass. Raises `ValueError` where it is not one of `topology`."""
    record = traced.record
    _check_shapes(traced, topology)
    payload = _PassPayload(
        now_s=traced.now_s,
        step=record.step,
        rank=record.rank,
        policy=record.policy,
        phase=record.phase,
        gate_reason=record.gate_reason,
        num_tokens=record.num_tokens_R.tolist(),
        num_vision_tokens=record.num_vision_tokens_R.tolist(),
        num_protected_tokens=record.num_protected_tokens_R.tolist(),
        num_refused_tokens=record.num_refused_tokens_R.tolist(),
        rows=to_planes(traced.rows_LREM),
        rows_after=to_planes(record.rows_after_LR),
        experts_ms=record.experts_ms_L.astype("<f8").tobytes(),
        layer_ms=record.layer_ms_L.astype("<f8").tobytes(),
        routed_mass=float(record.routed_mass),
        lost_mass=float(record.lost_mass),
        moved_mass=float(record.moved_mass),
        num_dropped_rows=int(record.num_dropped_rows),
        num_added_rows=int(record.num_added_rows),
        balance_ms=float(record.balance_ms),
        step_ms=float(record.step_ms),
        decision=traced.decision,
        num_missed=traced.num_missed,
        low_rows=b"" if record.low_rows_LR is None else to_planes(record.low_rows_LR),
        num_copies=b"" if record.num_copies_LR is None else to_planes(record.num_copies_LR),
        reports=record.reports,
    )
    return zlib.compress(msgspec.msgpack.encode(payload, enc_hook=_plain), COMPRESSION)


def decode_pass(payload: bytes, topology: Topology) -> TracedPass:
    """Inverse of `encode_pass`. Raises `ValueError`."""
    found = decode_payload(payload, _PassPayload)
    num_layers, num_ranks = topology.num_layers, topology.num_ranks
    shape = (num_layers, num_ranks, topology.num_experts, NUM_MODALITIES)
    rows_LREM = from_planes(found.rows, shape)
    record = StepRecord(
        step=found.step,
        policy=found.policy,
        phase=found.phase,
        gate_reason=found.gate_reason,
        rank=found.rank,
        num_tokens_R=_per_rank(found.num_tokens, num_ranks),
        num_vision_tokens_R=_per_rank(found.num_vision_tokens, num_ranks),
        num_protected_tokens_R=_per_rank(found.num_protected_tokens, num_ranks),
        num_refused_tokens_R=_per_rank(
            found.num_protected_tokens
            if found.num_refused_tokens is None
            else found.num_refused_tokens,
            num_ranks,
        ),
        rows_LEM=rows_LREM.sum(axis=1),
        rows_after_LR=from_planes(found.rows_after, (num_layers, num_ranks)),
        routed_mass=found.routed_mass,
        lost_mass=found.lost_mass,
        moved_mass=found.moved_mass,
        num_dropped_rows=found.num_dropped_rows,
        num_added_rows=found.num_added_rows,
        experts_ms_L=_times(found.experts_ms, num_layers),
        layer_ms_L=_times(found.layer_ms, num_layers),
        balance_ms=found.balance_ms,
        step_ms=found.step_ms,
        low_rows_LR=from_planes(found.low_rows, (num_layers, num_ranks))
        if found.low_rows
        else None,
        num_copies_LR=from_planes(found.num_copies, (num_layers, num_ranks))
        if found.num_copies
        else None,
        reports=found.reports,
    )
    return TracedPass(
        record=record,
        rows_LREM=rows_LREM,
        now_s=found.now_s,
        decision=found.decision,
        num_missed=found.num_missed,
    )


def to_planes(values: NDArray[Any]) -> bytes:
    """Integers of at least 0 as byte planes: one byte with their number, then the planes.

    Raises `ValueError` for a negative one. Example: (1, 258) is 2 planes, (1, 2) and (0, 1).
    """
    if values.size and int(values.min()) < 0:
        raise ValueError(f"a trace holds counts of at least 0, found {values.min()}")
    largest = int(values.max()) if values.size else 0
    num_planes = (largest.bit_length() + 7) // 8
    wide = values.astype("<u4" if num_planes <= 4 else "<u8", copy=False)
    planes = np.ascontiguousarray(wide).reshape(-1).view(np.uint8).reshape(-1, wide.itemsize)
    return bytes([num_planes]) + planes[:, :num_planes].T.tobytes()


def from_planes(data: bytes, shape: tuple[int, ...]) -> IntArray:
    """Inverse of `to_planes`, int64 of `shape`. Raises `ValueError` if it does not fit."""
    size = int(np.prod(shape))
    num_planes = data[0] if data else 0
    if not data or num_planes > 8 or len(data) != 1 + num_planes * size:
        raise ValueError(f"{len(data)} bytes are not {size} counts")
    wide = 4 if num_planes <= 4 else 8
    planes = np.zeros((size, wide), dtype=np.uint8)
    planes[:, :num_planes] = np.frombuffer(data, np.uint8, offset=1).reshape(num_planes, size).T
    return planes.reshape(-1).view(f"<u{wide}").astype(np.int64).reshape(shape)


def _plain(value: Any) -> int | float:
    if not isinstance(value, np.integer | np.floating):
        raise ValueError(f"a trace cannot hold a {type(value).__name__}")
    plain: int | float = value.item()
    return plain


def _check_shapes(traced: TracedPass, topology: Topology) -> None:
    record, num_layers, num_ranks = traced.record, topology.num_layers, topology.num_ranks
    shapes = {
        "rows_LREM": (traced.rows_LREM, (num_layers, num_ranks, topology.num_experts, 2)),
        "rows_after_LR": (record.rows_after_LR, (num_layers, num_ranks)),
        "num_tokens_R": (record.num_tokens_R, (num_ranks,)),
        "num_vision_tokens_R": (record.num_vision_tokens_R, (num_ranks,)),
        "num_protected_tokens_R": (record.num_protected_tokens_R, (num_ranks,)),
        "num_refused_tokens_R": (record.num_refused_tokens_R, (num_ranks,)),
        "experts_ms_L": (record.experts_ms_L, (num_layers,)),
        "layer_ms_L": (record.layer_ms_L, (num_layers,)),
    }
    if record.low_rows_LR is not None:
        shapes["low_rows_LR"] = (record.low_rows_LR, (num_layers, num_ranks))
    if record.num_copies_LR is not None:
        shapes["num_copies_LR"] = (record.num_copies_LR, (num_layers, num_ranks))
    for name, (values, shape) in shapes.items():
        if values.shape != shape:
            raise ValueError(f"pass {record.step}: {name} is {values.shape}, expected {shape}")


def _per_rank(values: list[int], num_ranks: int) -> IntArray:
    if len(values) != num_ranks:
        raise ValueError(f"{len(values)} ranks where the header says {num_ranks}")
    return np.array(values, dtype=np.int64)


def _times(data: bytes, num_layers: int) -> FloatArray:
    if len(data) != 8 * num_layers:
        raise ValueError(f"{len(data)} bytes are not {num_layers} times")
    return np.frombuffer(data, "<f8").astype(np.float64)


def decode_payload(payload: bytes, kind: Any) -> Any:
    """A payload as a struct of `kind`. Raises `ValueError`."""
    try:
        return msgspec.msgpack.decode(zlib.decompress(payload), type=kind)
    except (zlib.error, msgspec.DecodeError) as error:
        raise ValueError(str(error)) from error
