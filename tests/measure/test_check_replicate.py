"""The check of the lever replicate between real ranks, on a CPU, and what it can see.

Each rank is a process of its own under no launcher, so that one which survives another ends itself.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.dist

ROOT = Path(__file__).resolve().parents[2]
NUM_RANKS, NUM_STEPS = 2, 40
SMALL = {"device": "cpu", "steps": NUM_STEPS, "experts": 16, "slots": 3, "tokens": 64,
         "hidden": 64, "inner": 32}  # fmt: skip
LIMIT_S = 60
CHECK = "from tests.gpu import check_replicate\ncheck_replicate.main()\n"
NOTHING_COPIED = (
    "from sglang_moelb.ep.replicas import lever\n"
    "lever.pull_experts = lambda *tensors, **sizes: None\n"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a rank ended, and what it had said."""

    code: int
    text: str

    def copies(self) -> int:
        """Copies to this rank, from the line that a rank prints when all its steps were right."""
        (found,) = re.findall(rf"rank \d: {NUM_STEPS} steps right, (\d+) copies", self.text)
        return int(found)

    def seconds(self) -> int:
        """Time of all steps, from the same line."""
        (found,) = re.findall(r"copies, (\d+) s", self.text)
        return int(found)


def checked(*options: str, before: str = "") -> list[Ended]:
    """The check on all ranks, after the line `before`; a rank that hangs fails the test."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    sizes = [text for name, value in SMALL.items() for text in (f"--{name}", str(value))]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(NUM_RANKS),
           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", before + CHECK, *sizes, *options],
            cwd=ROOT, env={**env, "RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(NUM_RANKS)
    ]  # fmt: skip
    try:
        texts = [one.communicate(timeout=LIMIT_S)[0] for one in ranks]
    finally:
        for one in ranks:
            one.kill()
    return [Ended(code=one.returncode, text=text) for one, text in zip(ranks, texts, strict=True)]


def test_every_row_is_computed_by_a_whole_copy_of_its_own_expert() -> None:
    for one in checked():
        assert one.code == 0, one.text
        assert one.copies() > 0


def test_a_rank_that_is_late_in_every_step_changes_no_row() -> None:
    for one in checked("--slow-rank", "1"):
        assert one.code == 0, one.text
        assert one.copies() > 0
        assert one.seconds() >= 1, "40 steps of 20 ms, rounded"


def test_a_rank_that_dies_while_copies_are_under_way_ends_the_other_by_an_error() -> None:
    dead, left = checked("--die-at", str(NUM_STEPS // 2))
    assert dead.code == -signal.SIGKILL
    assert left.code not in (0, -signal.SIGKILL), left.text
    assert re.search("Connection (closed|reset) by peer", left.text), left.text
    assert "steps right" not in left.text


def test_slots_into_which_nothing_was_copied_are_seen() -> None:
    ended = checked(before=NOTHING_COPIED)
    assert all(one.code != 0 for one in ended)
    assert any(re.search(r"AssertionError: step \d+ rank \d: \d+ of \d+ rows are wrong", one.text)
               for one in ended)  # fmt: skip
