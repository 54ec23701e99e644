"""Settings of the whole suite, and a process that has SGLang imported for tests that need one."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from sglang_moelb.ep.standin.launch import cpu_environment

# Ranks of the tests are forked from one process that has imported what takes them longest.
multiprocessing.set_forkserver_preload(["torch", "torch.distributed", "torch.multiprocessing"])

# Without deadlines, because two cores are shared.
settings.register_profile("moelb", deadline=None)
settings.load_profile("moelb")


@pytest.fixture(scope="session")
def run_with_sglang() -> Iterator[Callable[..., Any]]:
    """`run_with_sglang(program, *argv, stdin="")`: run source where SGLang is imported already.

    In the stand-in's environment for two ranks, without which SGLang does not import here. Every
    call has a process of its own, forked from one that has done nothing but the import.
    """
    # -P: else our folders here would hide modules of the standard library, such as trace.
    command = [sys.executable, "-P", str(Path(__file__).with_name("imported_sglang.py"))]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **cpu_environment(2)},
    ) as process:
        asked, answers = process.stdin, process.stdout
        assert asked is not None
        assert answers is not None
        assert json.loads(answers.readline()) == {"imported": "sglang.launch_server"}

        def run(program: str, *argv: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
            request = {"program": program, "argv": ["-c", *argv], "stdin": stdin}
            asked.write(json.dumps(request) + "\n")
            asked.flush()
            return subprocess.CompletedProcess((program, *argv), **json.loads(answers.readline()))

        yield run
        asked.close()
