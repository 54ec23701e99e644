"""Which implementation the tests of an op run: the reference, or its Triton kernel.

In a process started with TRITON_INTERPRET=1 (as test_interpreted_kernels.py starts one) every test
of this folder runs the Triton kernel on CPU tensors, in Triton's interpreter; else the public
function, which takes the reference for CPU tensors.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def load_op() -> Callable[..., Callable]:
    """A function from an op's name, and that of a function in it, to what is under test."""

    def load(op: str, function: str = "") -> Callable:
        module = f"sglang_moelb.kernels.{op}" + (".kernel" if INTERPRETED else "")
        return getattr(importlib.import_module(module), function or op)

    return load
