"""Importance of experts measured elsewhere: a file, such as of removal losses.

Shape letters: L MoE layers, E logical experts.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from sglang_moelb.calibrate.types import CalibrateError, Importance
from sglang_moelb.types import FloatArray, Topology

SCHEMA = "sglang_moelb.importance"


class ImportanceFile(msgspec.Struct, frozen=True, kw_only=True):
    """What each expert is worth, [L, E], comparable over layers, higher is dearer."""

    schema: str = SCHEMA
    version: int = 1
    measure: str
    model: str = ""
    importance: list[list[float]]


def write_importance(path: Path, values_LE: FloatArray, *, measure: str, model: str) -> None:
    """Write values for `moelb calibrate --importance FILE`. Raises OSError."""
    content = ImportanceFile(measure=measure, model=model, importance=values_LE.tolist())
    path.write_bytes(msgspec.json.encode(content) + b"\n")


def read_importance(path: Path, topology: Topology) -> Importance:
    """The file at `path`. Raises `CalibrateError` unless it fits `topology`."""
    try:
        content = msgspec.json.decode(path.read_bytes(), type=ImportanceFile)
    except (OSError, msgspec.DecodeError) as error:
        raise CalibrateError(
            f"--importance {path}: cannot be read ({error}). Give `wanda`, or a file of schema "
            f"{SCHEMA} (docs/placement.md)."
        ) from error
    lengths = {len(row) for row in content.importance}
    if content.schema != SCHEMA or len(lengths) > 1:
        raise CalibrateError(f"--importance {path}: not a table of schema {SCHEMA}.")
    shape = (len(content.importance), *lengths)
    if shape != (topology.num_layers, topology.num_experts):
        raise CalibrateError(
            f"--importance {path}: is of {shape} layers and experts, the trace of "
            f"{(topology.num_layers, topology.num_experts)}. Both must be of one model."
        )
    values_LE = np.array(content.importance)
    if not np.isfinite(values_LE).all():
        raise CalibrateError(f"--importance {path}: holds values that are not finite numbers.")
    return Importance(values_LE=values_LE, measure=content.measure)
