from __future__ import annotations

import pytest

from ab.support import fake_command
from sglang_moelb.ab import run


@pytest.fixture
def fake_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every server that a plan starts is the fake one."""
    monkeypatch.setattr(run, "server_command", fake_command)
