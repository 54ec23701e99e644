"""A plugin for benchmarks: host and device time of every forward pass, stock or balanced.

Rank 0 appends one JSON row a pass to the file named by MOELB_BENCH_TIMES: when it began on the host
clock, how long `ModelRunner.forward` kept the host, and how long the device took from its first to
its last kernel. A row after the first full pass of a load also says how many rows went to each rank
in that pass, by layer, before a lever of a balanced server acts. With MOELB_BENCH_PARTS set, each
row of a balanced server also says how much of the host time went to our own functions (a function's
time holds that of those it calls).
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.skew_plugin import imposed_load, take_rows

VARIABLE, PARTS_VARIABLE = "MOELB_BENCH_TIMES", "MOELB_BENCH_PARTS"
_pending: deque[tuple[dict[str, Any], torch.cuda.Event, torch.cuda.Event, torch.Tensor | None]] = (
    deque()
)
_parts_us: Counter[str] = Counter()


def register() -> None:
    """Entry point of SGLang's plugin loader; does nothing unless the variable is set."""
    if VARIABLE not in os.environ:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    target = "sglang.srt.model_executor.model_runner.ModelRunner.forward"
    HookRegistry.register(target, _timed, HookType.AROUND)
    if os.environ.get(PARTS_VARIABLE):
        _time_parts()


def _timed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if torch.cuda.current_device() != 0:
        return forward(*args, **kwargs)
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before = Counter(_parts_us)
    begun.record()
    begun_s = time.perf_counter()
    result = forward(*args, **kwargs)
    host_ms = 1e3 * (time.perf_counter() - begun_s)
    rows_LR = take_rows()
    if rows_LR is not None:
        on_host = torch.empty(rows_LR.shape, dtype=rows_LR.dtype, pin_memory=True)
        rows_LR = on_host.copy_(rows_LR, non_blocking=True)
    ended.record()
    batch = kwargs.get("forward_batch", args[1] if len(args) > 1 else None)
    row = {
        "begun_s": begun_s,
        "num_tokens": int(batch.input_ids.shape[0]),
        "fewest_tokens": int(min(batch.global_num_tokens_cpu or [batch.input_ids.shape[0]])),
        "lever": _lever(),
        "load": imposed_load().words,
        "label": imposed_load().label,
        "host_ms": host_ms,
        "parts_us": {k: round(v) for k, v in (_parts_us - before).items()},
    }
    _pending.append((row, begun, ended, rows_LR))
    _flush()
    return result


def _lever() -> str:
    """The lever of the balanced server's policy; "" in a stock one."""
    from sglang_moelb.ep import points

    runtime = points.attached()
    return runtime._passes.policy.lever.name.lower() if runtime else ""


def _flush() -> None:
    with Path(os.environ[VARIABLE]).open("a", encoding="utf-8") as file:
        while _pending and _pending[0][2].query():
            row, begun, ended, rows_LR = _pending.popleft()
            row["device_ms"] = begun.elapsed_time(ended)
            if rows_LR is not None:
                row["routed_rows_LR"] = rows_LR.tolist()
            file.write(json.dumps(row) + "\n")


def _time_parts() -> None:
    from sglang_moelb.ep import records
    from sglang_moelb.ep.controller_link import ControllerLink
    from sglang_moelb.ep.exchange import Agreement
    from sglang_moelb.ep.open_pass import PassOpener
    from sglang_moelb.ep.runtime import Runtime

    serving: list[tuple[Any, tuple[str, ...]]] = [
        (PassOpener, ("begin", "opened")),
        (Runtime, ("note_requests", "before_dispatch", "run_experts", "after_experts",
                   "after_combine", "end_pass", "_gathered")),
        (records, ("close",)),
        (Agreement, ("start", "finish")),
        (ControllerLink, ("policy", "pass_begun", "submit")),
    ]  # fmt: skip
    for owner, names in serving:
        for name in names:
            setattr(owner, name, _counted(getattr(owner, name), name, time.perf_counter))


def _counted(function: Callable[..., Any], name: str, clock: Callable[[], float]) -> Any:
    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        begun_s = clock()
        try:
            return function(*args, **kwargs)
        finally:
            _parts_us[name] += 1e6 * (clock() - begun_s)

    return counted
