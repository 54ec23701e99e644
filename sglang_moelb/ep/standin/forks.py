"""Lets the processes of a server share one import of SGLang.

SGLang spawns them, and each then imports for 8 s of processor time; on a GPU machine they do so on
cores of their own, here on two. They are forked instead, from a process that has imported SGLang
and done nothing else: no plugin is loaded in it, and it has no thread, as `multiprocessing` asks.
A rank that fails signals its parent, as SGLang has it, which here is the process forked from; the
main process then learns of it by its watchdog.
With SGLANG_MOELB_STANDIN_SPAWN=1 they are spawned as SGLang does it.
"""

from __future__ import annotations

import multiprocessing
from typing import Any

from sglang_moelb.environment import spawn_requested

MANAGERS = "sglang.srt.managers"
IMPORTED = (
    "sglang_moelb.ep.standin.fork_source",
    "sglang.launch_server",
    f"{MANAGERS}.scheduler",
    f"{MANAGERS}.data_parallel_controller",
)


def fork_processes(result: Any, server_args: Any) -> None:
    """After `_set_envs_and_config`, which sets how processes start, before any has."""
    if spawn_requested():
        return
    multiprocessing.set_forkserver_preload(list(IMPORTED))
    multiprocessing.set_start_method("forkserver", force=True)
