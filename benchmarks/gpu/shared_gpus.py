"""A plugin for checks: several ranks on one GPU, where a host has fewer GPUs than ranks.

Rank r runs on GPU r modulo the number of GPUs, with kernels of DeepEP, NCCL and ours between the
ranks as between GPUs, but in time slices: what is computed is that of as many GPUs, how long it
takes is not. Does nothing unless MOELB_BENCH_SHARE_GPUS is set.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

VARIABLE = "MOELB_BENCH_SHARE_GPUS"


def register() -> None:
    """Entry point of SGLang's plugin loader."""
    if VARIABLE not in os.environ:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(
        "sglang.srt.managers.data_parallel_controller.maybe_reindex_device_id",
        shared,
        HookType.AROUND,
    )


def shared(
    reindex: Callable[[int], AbstractContextManager[int]], gpu_id: int
) -> AbstractContextManager[int]:
    """Around SGLang's choice of a rank's GPU by its number."""
    return reindex(gpu_id % torch.cuda.device_count())


def local_device() -> torch.device:
    """The GPU of this process of torchrun; ranks beyond the GPUs share them in turn."""
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
