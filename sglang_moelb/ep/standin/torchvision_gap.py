"""Makes PyPI's torchvision importable beside a torch that was built without CUDA.

Its extension does not load there, so that two detection operators stay undeclared and torchvision
refuses to be imported, although image processors need none of them. Imports nothing heavy: it runs
at the start of every server process.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

OPERATORS = ("nms", "qnms")


class TorchvisionGapFinder:
    """An import finder that finds nothing, but declares the operators before torchvision loads."""

    library: object = None  # the declarations live as long as this object

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Called by Python for each import; acts once, on the name `torchvision`."""
        if name == "torchvision" and TorchvisionGapFinder.library is None:
            import torch

            TorchvisionGapFinder.library = torch.library.Library("torchvision", "FRAGMENT")
            if torch.version.cuda is None:
                for operator in OPERATORS:
                    TorchvisionGapFinder.library.define(
                        f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                    )
        return None


def close_torchvision_gap() -> None:
    """Install the finder in this process, once; before torchvision is imported."""
    if not any(isinstance(finder, TorchvisionGapFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, TorchvisionGapFinder())
