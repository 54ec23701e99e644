"""Compiles kernels for Hopper in a process of its own, without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def compiled(program: str) -> dict[str, list[str]]:
    """What `program`, which runs under `no_gpu_driver`, prints: PTX of the variants by kernel."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the lean CPU install has no Triton; CI installs it for this test")
    child = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{HERE}"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-6000:]
    return json.loads(child.stdout)
