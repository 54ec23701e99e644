"""Where the runtime of a process sits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_moelb.ep.modality import RowWindow
from sglang_moelb.ep.seams import Form
from sglang_moelb.types import Topology


@dataclass(frozen=True, kw_only=True, slots=True)
class Seat:
    """Where a runtime sits: the model's sizes, this rank, and what finds a layer again."""

    topology: Topology
    rank: int
    device: torch.device
    window: RowWindow
    layer_of_dispatcher: dict[int, int]
    scoring: tuple[str, ...]  # one a layer
    form: Form
