"""What the leader's serving process and its controller process say to each other.

Each message is one packet: MessagePack of one of these. The counts of a pass do not travel: they
lie in a slot of the memory that both map (`ep.shared_counts`). Light to import: no torch.

Shape letters: L MoE layers.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from sglang_moelb.config import Config
from sglang_moelb.ep.agreed import Agreed
from sglang_moelb.types import Lever, Policy, Topology

MAX_PACKET_BYTES = 1 << 17  # 96 layers on 256 ranks take half of it


class Setup(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The first packet: who serves, and what is wanted. `trace` is a folder or ""."""

    parent_id: int  # the serving process
    topology: Topology
    rank: int
    config: Config
    num_slots: int
    has_metrics: bool
    trace: str


class RawPass(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A pass that the device has ended, with its counts in slot `slot`.

    `now_s` is the time that the controller is told, on the clock that all processes share; the
    times of layers are missing where they were not taken.
    """

    slot: int
    now_s: float
    step: int
    agreed: Agreed
    lever: Lever
    gate_reason: str
    experts_ms_L: list[float]
    layer_ms_L: list[float]
    balance_ms: float
    step_ms: float


class NewConfig(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The configuration has been changed while serving."""

    config: Config


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The controller waits for passes; or it cannot begin, because of `problem`."""

    policy: Policy
    totals: msgspec.Raw = msgspec.Raw(b"\x80")
    problem: str = ""


UNCHANGED = msgspec.Raw()  # empty; msgspec knows no Raw that may also be None


class Answer(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """A pass has been read and its slot is free; what the status shows comes packed as it is.

    `policy` is None, `verdict` and `heat` are UNCHANGED where they are those that were said last.
    """

    policy: Policy | None
    trace_state: str
    decision: msgspec.Raw
    totals: msgspec.Raw
    row: msgspec.Raw
    verdict: msgspec.Raw = UNCHANGED
    heat: msgspec.Raw = UNCHANGED


class Changed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A new configuration has been taken."""

    policy: Policy


class Died(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The last packet of a controller that ends by an error."""

    error: str


ToController = Setup | RawPass | NewConfig
FromController = Ready | Answer | Changed | Died

_to_controller = msgspec.msgpack.Decoder(ToController)
_from_controller = msgspec.msgpack.Decoder(FromController)


def _plain(value: Any) -> int | float:
    if not isinstance(value, np.integer | np.floating):
        raise TypeError(f"no message holds a {type(value).__name__}")
    plain: int | float = value.item()
    return plain


encode = msgspec.msgpack.Encoder(enc_hook=_plain).encode


def raw(shown: object) -> msgspec.Raw:
    """Plain JSON types, packed once and unpacked by whoever looks at them."""
    return msgspec.Raw(encode(shown))


def to_controller(packet: bytes) -> ToController:
    """Decode what the controller process received. Raises `msgspec.DecodeError`."""
    message: ToController = _to_controller.decode(packet)
    return message


def from_controller(packet: bytes) -> FromController:
    """Decode what the serving process received. Raises `msgspec.DecodeError`."""
    message: FromController = _from_controller.decode(packet)
    return message
