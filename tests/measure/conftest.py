"""Some of these tests import parts of SGLang, and it torchvision."""

from __future__ import annotations

from sglang_moelb.ep.standin.torchvision_gap import close_torchvision_gap

close_torchvision_gap()
