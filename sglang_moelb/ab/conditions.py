"""What the comparison ran on and with: machine, versions, workload, command."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from sglang_moelb.ab.result import Conditions
from sglang_moelb.ab.types import Plan

PACKAGES = ("sglang-moelb", "sglang", "torch", "transformers", "deep-ep", "numpy")


def conditions(plan: Plan, load_before: float | None) -> Conditions:
    """The conditions of `plan` on this machine, now; `load_before` from before the first start."""
    return Conditions(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join(plan.argv),
        seed=plan.seed,
        model=plan.model,
        workload=plan.workload,
        num_requests=len(plan.requests),
        num_image_requests=sum(request.kind == "image" for request in plan.requests),
        num_images=sum(request.num_images for request in plan.requests),
        num_answers=sum(request.answer is not None for request in plan.requests),
        rounds=plan.rounds,
        concurrency=plan.concurrency,
        max_tokens=plan.max_tokens,
        num_warmup=min(plan.num_warmup, len(plan.requests)),
        order=list(plan.order),
        prefix_cache=plan.prefix_cache,
        common_flags=list(plan.common_flags),
        cpu=_cpu_name(),
        num_cores=len(os.sched_getaffinity(0)),
        memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        gpus=_gpus(),
        load_before=load_before,
        versions={"python": platform.python_version()} | _versions(),
    )


def load_average() -> float:
    """How many processes wanted to run on the machine, on average over the last minute."""
    return os.getloadavg()[0]


def cuda_visible() -> bool:
    """Whether torch is installed here and sees a CUDA device."""
    if find_spec("torch") is None:
        return False
    import torch  # slow, and only needed when nothing else tells

    return bool(torch.cuda.is_available())


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    answer = subprocess.run(
        [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    return answer.stdout.strip().splitlines() if answer.returncode == 0 else []
