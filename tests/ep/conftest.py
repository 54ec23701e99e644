"""Fixtures of `tests/ep`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sglang_moelb.ep.standin.torchvision_gap import close_torchvision_gap

from .ranks import Ranks

close_torchvision_gap()  # some tests import parts of SGLang, and it torchvision


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Four gloo processes, started when a test first asks."""
    made = Ranks(tmp_path_factory.mktemp("ranks"))
    yield made
    made.close()
