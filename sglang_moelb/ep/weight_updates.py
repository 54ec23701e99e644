"""Updates of a served model's weights, where something of ours was derived from them at start."""

from __future__ import annotations

from typing import Any


def refuse_updates(layer: Any, what: str, why: str) -> None:
    """Let SGLang refuse all updates of weights by request, from disk, tensors, a group or IPC.

    It asks every module of the model before it writes; a refused update leaves the server serving.

    Args:
        layer: a module of the model.
        what: what was set that forbids them, such as a knob.
        why: what an update would break.
    """
    layer._derived_weight_cache_error = (
        f"sglang_moelb: weights cannot be updated with {what}: {why}. Restart the server with the "
        f"new checkpoint, or start it without {what}"
    )
