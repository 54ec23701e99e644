"""What else than the configuration is told by the environment: the stand-in, and SGLang's filters.

Light to import: no SGLang, no torch.
"""

from __future__ import annotations

import os

STANDIN_VARIABLE = "SGLANG_MOELB_STANDIN"
SPAWN_VARIABLE = "SGLANG_MOELB_STANDIN_SPAWN"


def standin_requested() -> bool:
    """Whether this process is to run DeepEP's path on CPU (`ep/standin`)."""
    return os.environ.get(STANDIN_VARIABLE, "") == "1"


def spawn_requested() -> bool:
    """Whether the stand-in is to leave how processes start to SGLang."""
    return os.environ.get(SPAWN_VARIABLE, "") == "1"


def plugin_filters() -> tuple[str, str]:
    """SGLang's own choice of plugins: `SGLANG_PLUGINS` and `SGLANG_PLATFORM`, "" where not set."""
    return os.environ.get("SGLANG_PLUGINS", ""), os.environ.get("SGLANG_PLATFORM", "")
