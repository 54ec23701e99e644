"""The fork: apply, revert and inspect the patches that put our calls into SGLang's source.

Runs on the host, before a server starts; imports neither sglang nor torch. `diff` reads and applies
unified diffs, `series` finds the patches and lints their headers, `site` is one installed SGLang,
`files` writes many files as one step, `operations` decides what may be done.
"""

from __future__ import annotations

from sglang_moelb.patching.diff import PatchError
from sglang_moelb.patching.operations import FileState, PatchStatus, State, apply, revert, status

__all__ = ["FileState", "PatchError", "PatchStatus", "State", "apply", "revert", "status"]
