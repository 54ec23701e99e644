"""The Triton kernels pass the tests of their references, and the package needs no Triton on CPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
OPS = (
    "count_experts",
    "plan_cuts",
    "cut_tokens",
    "widen_candidates",
    "token_amounts",
    "place_replicas",
    "reroute",
    "choose_copy",
    "pull_experts",
    "convert_fp4",
    "quantise_rows_fp4",
    "grouped_fp4",
    "plan_downgrade",
    "convert_fp8",
    "quantise_rows",
    "join_rows",
    "lay_blocks",
)


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="the lean CPU install has no Triton; CI installs it for this test",
)
def test_every_triton_kernel_passes_the_tests_of_its_reference() -> None:
    files = [str(HERE / f"test_{name}.py") for name in (*OPS, "capacities")]
    # The interpreter computes in numpy, which warns of the infinities that some tests put in.
    options = ["-q", "-x", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    child = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
    assert " passed" in child.stdout


def test_the_ops_run_on_cpu_tensors_without_triton() -> None:
    imports = "\n".join(f"import sglang_moelb.kernels.{op}" for op in OPS)
    program = f"""
import sys
sys.modules["triton"] = None  # an import of it now fails
import torch
{imports}
from sglang_moelb.kernels.token_amounts import token_amounts
none = torch.zeros(0, dtype=torch.uint8)
assert token_amounts(torch.zeros(0, 4), none, none.bool(), delta=1.0).shape == (0,)
"""
    child = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert child.returncode == 0, child.stderr


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_reference_a_kernel_a_test_and_a_benchmark(op: str) -> None:
    folder = ROOT / "sglang_moelb" / "kernels" / op
    for path in (
        folder / "__init__.py",
        folder / "ref.py",
        folder / "kernel.py",
        HERE / f"test_{op}.py",
        ROOT / "benchmarks" / f"bench_{op}.py",
    ):
        assert path.is_file(), f"{op} lacks {path.relative_to(ROOT)}"


def test_the_list_of_ops_is_the_folders() -> None:
    kernels = ROOT / "sglang_moelb" / "kernels"
    assert {path.parent.name for path in kernels.glob("*/ref.py")} == set(OPS)
