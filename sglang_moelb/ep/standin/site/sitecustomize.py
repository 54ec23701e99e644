"""Runs at the start of every server process on CPU, before anything else is imported.

No SGLang plugin runs early enough for what is done here. A `sitecustomize` that stands later on
the path is run too, as it would have been without this one.
"""

from __future__ import annotations

import gc
import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path

from sglang_moelb.ep.standin.torchvision_gap import close_torchvision_gap

GC_THRESHOLD = 50_000


def _start_quickly() -> None:
    """Spare each process of a server a quarter of the 10 s that its imports cost on one core."""
    # Most of what is allocated during imports stays; looking for garbage in it is in vain.
    gc.set_threshold(GC_THRESHOLD, *gc.get_threshold()[1:])
    # The report's images need scikit-learn; in a server transformers would import it for nothing.
    sys.modules.setdefault("sklearn", None)  # type: ignore[arg-type]


def _run_next_sitecustomize() -> None:
    here = Path(__file__).resolve().parent
    rest = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    spec = PathFinder.find_spec("sitecustomize", rest)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


_start_quickly()
close_torchvision_gap()
_run_next_sitecustomize()
