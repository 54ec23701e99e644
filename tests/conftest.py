"""Settings of the whole suite: Hypothesis without deadlines, because two cores are shared."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("moelb", deadline=None)
settings.load_profile("moelb")
