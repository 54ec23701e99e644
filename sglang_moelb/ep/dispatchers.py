"""The dispatchers of a MoE layer, where SGLang wraps some to overlap batches."""

from __future__ import annotations

from typing import Any


def dispatchers_of(layer: Any) -> list[Any]:
    """Those that `layer.dispatcher` chooses among (SGLang's `MaybeTboDeepEPDispatcher`), or it."""
    return list(getattr(layer.dispatcher, "_inners", [layer.dispatcher]))
