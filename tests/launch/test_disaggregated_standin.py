"""What the stand-in changes for the prefill role, without a server and without Mooncake."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_moelb.ep.standin.launch import cpu_environment

PROGRAM = """
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.disaggregation.utils import KVClassType, TransferBackend, get_kv_class
sender = get_kv_class(TransferBackend.MOONCAKE, KVClassType.SENDER)
print(sender.__name__, sender.supports_host_tensor_indices)
"""


def test_mooncakes_sender_does_not_ask_for_pinned_memory_on_a_host(
    run_with_sglang: Callable[..., Any],
) -> None:
    done = run_with_sglang(PROGRAM)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-2:] == ["MooncakeKVSender", "False"]


def test_mooncake_is_kept_to_tcp() -> None:
    assert cpu_environment(2)["MOONCAKE_PROTOCOL"] == "tcp"
    assert cpu_environment(2)["MC_FORCE_TCP"] == "1"
