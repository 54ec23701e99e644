"""An exported probe and a fixed set of test items on a device, for what measures without a server.

Host or device; PLAIN ways and float32 on the host, FAST and bfloat16 elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.probe.device import Batch, upload
from benchmarks.probe.export import load
from benchmarks.probe.loader import make_fixed
from benchmarks.probe.model import FAST, PLAIN, Probe, Ways
from benchmarks.probe.pack import measure, write
from benchmarks.probe.tasks import TASKS, make_item


def ways_on(device: torch.device) -> Ways:
    """How the probe computes on `device`."""
    return FAST if device.type == "cuda" else PLAIN


def placed(probe: Probe, device: torch.device, ways: Ways) -> Probe:
    """`probe`, moved to `device` at the precision of `ways`."""
    return probe.to(device, torch.float32 if ways == PLAIN else torch.bfloat16)


def exported(folder: Path) -> Probe:
    """The probe in `folder`, on the host; SystemExit with the reason where there is none."""
    try:
        return load(folder)
    except ValueError as error:
        raise SystemExit(str(error)) from error


def fixed_passes(
    first_index: int, num_each: int, pass_tokens: int, num_workers: int
) -> list[dict[str, NDArray[Any]]]:
    """Passes of `num_each` test items a task from number `first_index` on, on the host."""
    indices = range(first_index, first_index + num_each)
    return make_fixed(make_item, tuple(TASKS), "test", indices, pass_tokens, num_workers)


def uploaded(arrays: dict[str, NDArray[Any]], device: torch.device, ways: Ways) -> Batch:
    """One pass on `device`."""
    block = np.empty(measure(arrays).num_bytes, dtype=np.uint8)
    return upload(write(arrays, block), block, device, ways.attention)


def fixed_batches(
    first_index: int,
    num_items: int,
    pass_tokens: int,
    num_workers: int,
    device: torch.device,
    ways: Ways,
) -> list[Batch]:
    """Passes of `num_items` test items over all tasks, rounded up, on `device`."""
    num_each = -(-num_items // len(TASKS))
    passes = fixed_passes(first_index, num_each, pass_tokens, num_workers)
    return [uploaded(arrays, device, ways) for arrays in passes]
