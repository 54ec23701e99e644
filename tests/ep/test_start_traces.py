"""A server whose trace cannot be written does not start, and says which flag and folder it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sglang_moelb.config import TRACE_VARIABLE, Config
from sglang_moelb.ep.metrics import Metrics
from sglang_moelb.ep.modality import RowWindow
from sglang_moelb.ep.seat import Seat
from sglang_moelb.ep.start import _controller
from sglang_moelb.ep.token_trace import token_trace_of
from sglang_moelb.trace.types import PASSES, TOKENS

from .layers import topology


def seat(rank: int = 0) -> Seat:
    return Seat(
        topology=topology(2),
        rank=rank,
        device=torch.device("cpu"),
        window=RowWindow(attn_tp_size=1, attn_tp_rank=0),
        layer_of_dispatcher={},
        scoring=("softmax",),
        form="hook",
    )


def trace_passes(seat: Seat, config: Config) -> None:
    """Begin as the leader does, which must not get far."""
    _controller(seat, config, None).stop()


def test_without_the_flags_nothing_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRACE_VARIABLE, raising=False)
    assert token_trace_of(seat(), Config()) is None


def test_every_rank_traces_tokens_into_its_own_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TRACE_VARIABLE, f"16:{tmp_path}")
    for rank in (0, 1):
        trace = token_trace_of(seat(rank), Config())
        assert trace is not None
        assert trace.every == 16
        assert (tmp_path / TOKENS.file_name(rank, 0)).is_file()


@pytest.fixture(autouse=True)
def _no_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Metrics, "if_enabled", lambda: None)


@pytest.mark.parametrize("contents", [PASSES, TOKENS], ids=lambda contents: contents.what)
def test_a_folder_of_another_server_is_refused_and_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contents: object
) -> None:
    monkeypatch.setenv(TRACE_VARIABLE, f"16:{tmp_path}")
    taken = tmp_path / contents.file_name(0, 0)  # type: ignore[attr-defined]
    taken.write_bytes(b"of another server")
    start_it = trace_passes if contents is PASSES else token_trace_of
    flag = "--moelb-trace" if contents is PASSES else "--moelb-trace-tokens"
    with pytest.raises(SystemExit, match=rf"{flag}: trace folder .*a folder of its own"):
        start_it(seat(), Config())
    assert taken.read_bytes() == b"of another server"


@pytest.mark.parametrize("start_it", [trace_passes, token_trace_of])
def test_a_folder_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start_it: object
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(TRACE_VARIABLE, f"16:{tmp_path / 'file' / 'folder'}")
    with pytest.raises(SystemExit, match="cannot be written"):
        start_it(seat(), Config())  # type: ignore[operator]
