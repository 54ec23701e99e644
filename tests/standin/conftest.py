"""Loaded before the tests import transformers, whose image processors import torchvision."""

from __future__ import annotations

from sglang_moelb.ep.standin.torchvision_gap import close_torchvision_gap

close_torchvision_gap()
