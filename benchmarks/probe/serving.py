"""A server of the probe with room for the lever downgrade, on two expert-parallel ranks."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_moelb.ep.standin.launch import cpu_environment, cpu_server_args

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "benchmarks" / "probe" / "checkpoint"
START = {"capacity": {"min_batch_tokens": 1}, "controller": {"timeout_ms": 5000.0}}
NUM_RANKS = 2
READY_S = 300.0
# Ranks that share a GPU, where a host has one: benchmarks/gpu/shared_gpus.py.
SHARING = {
    "MOELB_BENCH_SHARE_GPUS": "1",
    "NCCL_MULTI_RANK_GPU_ENABLE": "1",
    "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1",
}
GPU_FLAGS = (
    "--tp", "2", "--ep", "2", "--dp", "2", "--enable-dp-attention",
    "--moe-a2a-backend", "deepep", "--deepep-mode", "normal", "--moe-runner-backend", "deep_gemm",
    "--deepep-dispatcher-output-dtype", "bf16", "--attention-backend", "triton",
    "--mm-attention-backend", "triton_attn", "--sampling-backend", "pytorch",
    "--grammar-backend", "none", "--dtype", "bfloat16", "--context-length", "4096",
    "--mem-fraction-static", "0.6", "--max-total-tokens", "200000",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Server:
    """A server with room for the lever."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def call(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Its answer in JSON; SystemExit with what it says where it refuses."""
        raw = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data=raw, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                found: dict[str, Any] = json.loads(answer.read())
                return found
        except urllib.error.HTTPError as error:
            raise SystemExit(f"{path}: {error.read().decode(errors='replace')}") from error

    def is_ready(self) -> bool:
        """Whether it answers; SystemExit with the end of its log where it has ended."""
        if self.process.poll() is not None:
            tail = self.log.read_text(errors="replace")[-4000:]
            raise SystemExit(f"the server ended, {self.log}:\n{tail}")
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return True
        except OSError:
            return False


@contextmanager
def serving(name: str, device: str, folder: Path) -> Iterator[Server]:
    """A server whose lever has the format `name`, in mode none; its log is in `folder`."""
    config = json.dumps({**START, "downgrade": {"ready": True, "format": name}})
    flags = GPU_FLAGS if device == "cuda" else cpu_server_args(NUM_RANKS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(MODEL), *flags]
    command += ["--host", "127.0.0.1", "--port", str(port), "--disable-radix-cache"]
    command += ["--moelb-mode", "none", "--moelb-config", config]
    log = folder / f"server-{name}.log"
    with tempfile.TemporaryDirectory() as plugins, log.open("wb") as output:
        _make_known(Path(plugins))
        environment = {**os.environ}
        if device == "cpu":
            environment |= cpu_environment(NUM_RANKS)
        else:
            environment |= SHARING if _num_gpus() < NUM_RANKS else {}
        paths = [plugins, environment.get("PYTHONPATH", ""), str(ROOT)]
        if device == "cpu":  # the stand-in's own comes first
            paths = [environment["PYTHONPATH"], plugins, str(ROOT)]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env=environment, start_new_session=True,
        )  # fmt: skip
        server = Server(f"http://127.0.0.1:{port}", log, process)
        try:
            deadline_s = time.monotonic() + READY_S
            while not server.is_ready():
                if time.monotonic() > deadline_s:
                    raise SystemExit(f"the server was not ready in {READY_S:.0f} s, {log}")
                time.sleep(0.5)
            yield server
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _make_known(folder: Path) -> None:
    """Lay the metadata that SGLang finds plugins by, for a checkout that is not installed."""
    from importlib.metadata import entry_points

    known = {one.name for one in entry_points(group="sglang.srt.plugins")}
    for name, target in (
        ("moelb", "sglang_moelb.plugin:register"),
        ("moelb_share", "benchmarks.gpu.shared_gpus:register"),
    ):
        if name in known:
            continue
        info = folder / f"{name}-0.1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
        (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{name} = {target}\n")
