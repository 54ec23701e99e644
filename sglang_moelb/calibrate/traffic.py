"""Reads routing from a trace: a share of the passes to calibrate on, the others to judge by.

Shape letters: P passes, L MoE layers, E logical experts, M modalities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from sglang_moelb.calibrate.types import Calibrated, CalibrateError
from sglang_moelb.controller.resident_load import LoadSums
from sglang_moelb.placement import Expected, LayerPlacement
from sglang_moelb.trace.reader import Trace
from sglang_moelb.types import IntArray, Topology

PASSES_AT_ONCE = 64


def is_calibrated_on(number: int, share: float) -> bool:
    """Whether prefill pass `number` is one to calibrate on: the first, and evenly spread after it.

    Spread, so that a load that drifts is seen as a whole.

    Example: share 0.1 takes passes 0, 10, 20, ...
    """
    return number == 0 or int(number * share + 1e-9) != int((number - 1) * share + 1e-9)


def calibrate_on(trace: Trace, share: float, tick: Callable[[], None]) -> Calibrated:
    """Sum the rows of a share of the prefill passes; `tick` is called after each pass read.

    Raises `CalibrateError` for a trace without a prefill pass that has tokens.
    """
    sizes = trace.header.topology
    rows_LE = np.zeros((sizes.num_layers, sizes.num_experts), dtype=np.int64)
    num_passes = num_read = 0
    for rows in _prefill_rows(trace):
        if is_calibrated_on(num_read, share):
            rows_LE += rows
            num_passes += 1
        num_read += 1
        tick()
    if not num_read:
        raise CalibrateError(
            f"{trace.files[0]}: no prefill pass with tokens. Trace a server while it serves "
            "prompts."
        )
    return Calibrated(rows_LE=rows_LE, num_passes=num_passes, num_passes_read=num_read)


def judge(
    trace: Trace,
    layers: tuple[LayerPlacement, ...],
    topology: Topology,
    calibrated: Calibrated,
    share: float,
    tick: Callable[[], None],
) -> tuple[Expected, IntArray]:
    """What a placement does to the passes that it was not made from, and their rows, [L, E].

    Where there are no others, to the same passes, which `Expected.same_passes` says. Passes that
    were written since the trace was first read are left out.
    """
    same = calibrated.num_passes == calibrated.num_passes_read
    plain = tuple(LayerPlacement() for _ in layers)
    before, after = LoadSums(plain, topology), LoadSums(layers, topology)
    held: list[IntArray] = []
    for number, rows_LE in enumerate(_prefill_rows(trace)):
        if number == calibrated.num_passes_read:
            break
        if same or not is_calibrated_on(number, share):
            held.append(rows_LE)
        if len(held) == PASSES_AT_ONCE:
            _add(held, before, after)
        tick()
    _add(held, before, after)
    expected = Expected(
        num_passes=before.num_passes,
        same_passes=same,
        before=before.figures(),
        after=after.figures(),
    )
    return expected, before.rows_LE


def _add(held: list[IntArray], *sums: LoadSums) -> None:
    if held:
        rows_PLE = np.stack(held)
        for one in sums:
            one.add(rows_PLE)
        held.clear()


def _prefill_rows(trace: Trace) -> Iterator[IntArray]:
    """Rows on each expert, [L, E], of each prefill pass that has any."""
    for traced in trace.passes():
        if traced.record.phase == "prefill" and traced.rows_LREM.any():
            yield traced.record.rows_LEM.sum(axis=2)
