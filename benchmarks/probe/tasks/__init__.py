"""The tasks of the probe, and their items, without limit from a seed."""

from __future__ import annotations

import zlib
from types import MappingProxyType

import numpy as np

from benchmarks.probe.item import Item, Split
from benchmarks.probe.tasks import charts, reading, scenes, several, text
from benchmarks.probe.tasks.base import Task, draw

__all__ = ["TASKS", "Task", "make_item"]

TASKS: MappingProxyType[str, Task] = MappingProxyType(
    {
        task.name: task
        for module in (reading, scenes, charts, several, text)
        for task in module.TASKS
    }
)
_SPLITS: tuple[Split, ...] = ("train", "test")


def make_item(task: str, split: Split, index: int, *, seed: int = 0) -> Item:
    """Item `index` of a task and split: always the same one for the same four arguments.

    Contents of the two splits are disjoint for every seed. Raises ValueError for an unknown task
    or split. Runs on the host, about half a millisecond.
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r}: use one of {', '.join(TASKS)}")
    if split not in _SPLITS:
        raise ValueError(f"split={split!r}: use one of {', '.join(_SPLITS)}")
    rng = np.random.default_rng([seed, index, _SPLITS.index(split), zlib.crc32(task.encode())])
    scene = draw(TASKS[task], split, rng)
    return Item(task=task, split=split, index=index, parts=scene.render(rng), answer=scene.answer)
