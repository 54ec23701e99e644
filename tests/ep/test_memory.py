"""Laws of the memory ledger in the log: who holds memory, DeepEP's buffers, and the KV cache."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_moelb.ep.memory import MemoryLedger, with_experts, with_replicas

pytest.importorskip("sglang.srt.runtime_context")


class DeepEPBuffer:
    num_nvl_bytes, num_rdma_bytes = 3 << 20, 2 << 20


def with_buffers(monkeypatch: pytest.MonkeyPatch, buffer: Any) -> None:
    """Let SGLang have `buffer` for DeepEP, or none yet."""
    from sglang.srt.runtime_context import get_resources

    state = SimpleNamespace(buffer=buffer)
    monkeypatch.setitem(get_resources().buffers, "deepep_ep_state", state)


@pytest.mark.parametrize("buffer", [None, DeepEPBuffer()], ids=["at start", "after a pass"])
def test_whatever_holds_memory_has_one_line_in_the_log_with_deepeps_buffers_and_what_is_lost(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, buffer: Any
) -> None:
    with_buffers(monkeypatch, buffer)
    mib = 1 << 20
    plain = MemoryLedger(kv_token_bytes=1000)
    holding = [
        replace(plain, staging_bytes=mib),
        replace(plain, resident_bytes=mib),
        with_replicas(plain, mib, None),
        with_experts(plain, 5 * mib, 4 * mib, None),
    ]
    with caplog.at_level(logging.INFO, logger="sglang_moelb"):
        plain.log()
        with_experts(plain, 0, 0, None).log()
        assert not caplog.messages, "nothing is held"
        for ledger in holding:
            ledger.log()
    lines = caplog.messages
    assert len(lines) == len(holding)
    buffers = "5 MiB DeepEP's buffers" if buffer else "DeepEP's buffers not yet"
    assert all(buffers in line for line in lines)
    lost = ["1049", "1049", "1049", "0"]
    for line, tokens in zip(lines, lost, strict=True):
        assert f"the KV cache has {tokens} tokens less" in line
    assert "4.0 MiB experts, 5.0 before resident.placement" in lines[-1]
    assert lines[-1].endswith("1048 more for experts stored low")
