"""The environment and the flags with which SGLang 0.5.23 serves on a machine without a GPU.

`python -m sglang_moelb.ep.standin.launch --ranks 2 -- --model-path DIR --port 30000` becomes
`python -m sglang.launch_server` with both. Programs that start servers themselves use
`cpu_environment` and `cpu_server_args`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Literal, get_args

from sglang_moelb.environment import STANDIN_VARIABLE
from sglang_moelb.ep.standin.deep_ep_checks import SUPPORTED_NUM_RANKS
from sglang_moelb.ep.standin.hooks import SITE

A2A = Literal["deepep", "none"]


def cpu_environment(num_ranks: int) -> dict[str, str]:
    """What to add to the environment of a server process with `num_ranks` ranks.

    Each rank gets one core of those this process may use, in turn: SGLang refuses more ranks than
    NUMA nodes without such a list. A PYTHONPATH that is set already is kept behind ours.
    SGLANG_PLUGINS is left alone, so that every installed plugin is loaded.
    """
    _check_ranks(num_ranks)
    cores = sorted(os.sched_getaffinity(0))
    return {
        STANDIN_VARIABLE: "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(SITE), os.environ.get("PYTHONPATH")))),
        "SGLANG_USE_CPU_ENGINE": "1",
        "SGLANG_CPU_OMP_THREADS_BIND": "|".join(
            str(cores[rank % len(cores)]) for rank in range(num_ranks)
        ),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TORCHDYNAMO_DISABLE": "1",
        # Float32 experts take SGLang's DeepEP path only with this variable; the flag
        # --deepep-dispatcher-output-dtype alone does it for bfloat16.
        "SGLANG_DEEPEP_BF16_DISPATCH": "1",
        # A torch with CUDA on a machine without a driver must not look for NCCL.
        "SGLANG_NCCL_SO_PATH": "/nonexistent",
        # Prefill and decode roles: Mooncake must not look for InfiniBand. SGLang reads the first,
        # Mooncake the second.
        "MOONCAKE_PROTOCOL": "tcp",
        "MC_FORCE_TCP": "1",
    }


def cpu_server_args(num_ranks: int, a2a: A2A = "deepep", *, attention_dp: bool = True) -> list[str]:
    """Flags for a small model: tensor and expert parallel over `num_ranks`, graphs off, float32.

    Args:
        num_ranks: 2, 4 or 8, one process each.
        a2a: "deepep" is the path of a GPU server, "none" SGLang's all-reduce path.
        attention_dp: every rank runs the attention of its own requests (vision models need it
            with DeepEP); else attention is tensor parallel.

    A caller may append a flag again: the last one counts.
    """
    _check_ranks(num_ranks)
    if a2a not in get_args(A2A):
        raise ValueError(f"a2a={a2a!r}: use one of {get_args(A2A)}")
    ranks = str(num_ranks)
    flags = ["--device", "cpu", "--tp-size", ranks, "--ep-size", ranks]
    flags += ["--attention-backend", "torch_native", "--sampling-backend", "pytorch"]
    flags += ["--grammar-backend", "none", "--disable-overlap-schedule", "--dtype", "float32"]
    flags += ["--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled"]
    flags += ["--mem-fraction-static", "0.3", "--max-total-tokens", "8192"]
    flags += ["--max-running-requests", "8", "--context-length", "2048"]
    # Attention DP divides the chunk by the number of ranks.
    flags += ["--chunked-prefill-size", str(512 * (num_ranks if attention_dp else 1))]
    if a2a == "deepep":
        flags += ["--moe-a2a-backend", "deepep", "--deepep-mode", "normal"]
        flags += ["--moe-runner-backend", "deep_gemm", "--deepep-dispatcher-output-dtype", "bf16"]
    if attention_dp:
        flags += ["--attn-dp-size", ranks]
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    """Replace this process by an SGLang server on CPU. What follows `--` goes to SGLang."""
    parser = argparse.ArgumentParser(
        prog="python -m sglang_moelb.ep.standin.launch",
        description="Serve with SGLang on a machine without a GPU, DeepEP path included.",
    )
    parser.add_argument("--ranks", type=int, default=2, help="EP ranks: 2, 4 or 8 (default 2)")
    parser.add_argument(
        "--a2a", choices=get_args(A2A), default="deepep", help="MoE all-to-all (default deepep)"
    )
    parser.add_argument(
        "--tp-attention",
        action="store_true",
        help="attention tensor parallel, not data parallel over the ranks",
    )
    parser.add_argument("sglang", nargs="*", help="flags of sglang.launch_server, after --")
    args = parser.parse_args(argv)
    try:
        environment = cpu_environment(args.ranks)
        flags = cpu_server_args(args.ranks, args.a2a, attention_dp=not args.tp_attention)
    except ValueError as error:
        parser.error(str(error))
    os.environ.update(environment)
    command = [sys.executable, "-m", "sglang.launch_server", *flags, *args.sglang]
    os.execv(sys.executable, command)


def _check_ranks(num_ranks: int) -> None:
    if num_ranks not in SUPPORTED_NUM_RANKS:
        raise ValueError(f"ranks={num_ranks}: use one of {SUPPORTED_NUM_RANKS}")


if __name__ == "__main__":
    main()
