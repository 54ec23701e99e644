"""What `GET /moelb/live` answers: the last pass and the totals in a few kilobytes.

Versioned: a reader refuses an answer of a later version, and ignores fields that it does not know.

Shape letters: L MoE layers, R ranks.
"""

from __future__ import annotations

from typing import Any

import msgspec

from sglang_moelb.live.heat import Heat

VERSION = 1
AGE_HEADER = "Moelb-Age-Ms"  # how long ago the schedulers gave the answer


class Pass(msgspec.Struct, frozen=True, kw_only=True):
    """The pass that is shown: the last one that was large enough for a lever, or else the last.

    `balance_*_L` are max/mean rank rows of each layer, `rows_*_R` rows of each rank over all
    layers, before and after the lever. Times in milliseconds, 0 where not measured.
    """

    step: int
    lever: str
    gate_reason: str
    num_tokens_R: list[int]
    num_vision_tokens: int
    num_protected_tokens: int
    balance_before_L: list[float]
    balance_after_L: list[float]
    rows_before_R: list[int]
    rows_after_R: list[int]
    lost_share: float
    moved_share: float
    step_ms: float
    experts_ms: float
    layer_ms: float
    balance_ms: float


class Stretch(msgspec.Struct, frozen=True, kw_only=True):
    """Recorded passes in a row under one lever of the policy; `reason` is that of the last."""

    first_step: int
    last_step: int
    num_passes: int
    num_gated: int  # of them, passes in which the lever stayed unused, mostly too small ones
    lever: str
    reason: str


class History(msgspec.Struct, frozen=True, kw_only=True):
    """The last recorded passes, oldest first; balances are means over layers."""

    step: list[int]
    num_tokens: list[int]
    lever: list[str]
    balance_before: list[float]
    balance_after: list[float]
    step_ms: list[float]
    balance_ms: list[float]


class Live(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The answer. Where `active` is false nothing else is known but `reason`.

    `spent_share` is gate mass lost over the quality window, as a share, None before it is known.
    """

    moelb_live: int  # the version; its name tells this answer from any other JSON
    active: bool = True
    reason: str = ""
    form: str = ""
    mode: str = ""
    num_layers: int = 0
    num_experts: int = 0
    num_ranks: int = 0
    num_ranks_answering: int = 0
    lever: str = "none"
    epoch: int = 0
    capacity: str = ""
    policy_reason: str = ""
    controller: str = ""
    trace: str = "off"
    decision: str = ""
    expected_gain: float | None = None
    num_passes: int = 0
    num_prefill_passes: int = 0
    num_passes_by_lever: dict[str, int] = {}
    spent_share: float | None = None
    quality_budget: float = 0.0
    quality_window_passes: int = 0
    last: Pass | None = None
    heat: Heat | None = None
    decisions: list[Stretch] = []
    history: History | None = None
    memory: dict[str, float] = {}
    verdict: str = ""


def encode(live: Live) -> bytes:
    """The answer as JSON."""
    return msgspec.json.encode(live)


_DECODER = msgspec.json.Decoder(Live)
_VERSION_DECODER = msgspec.json.Decoder(dict[str, Any])


def decode(body: bytes) -> Live:
    """Read an answer. Raises ValueError that says what it is instead."""
    try:
        version = _VERSION_DECODER.decode(body).get("moelb_live")
    except msgspec.DecodeError as error:
        raise ValueError(f"the answer is not a JSON object ({error})") from error
    if not isinstance(version, int):
        raise ValueError("the answer is JSON, but not a live view of sglang_moelb")
    if version > VERSION:
        raise ValueError(
            f"the server speaks version {version} of the live view and this moelb only up to "
            f"{VERSION}; upgrade it: pip install -U sglang-moelb"
        )
    try:
        return _DECODER.decode(body)
    except msgspec.DecodeError as error:
        raise ValueError(f"the live view cannot be read ({error})") from error
