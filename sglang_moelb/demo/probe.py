"""The demo's model and requests where the repository is at hand: the trained probe and its items.

The probe lives in `benchmarks/`, which an installed package has not; its items are written by a
program of the repository's, in a process of its own. Host only.
"""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from sglang_moelb.ab.types import AbError, Request
from sglang_moelb.ab.workload import demo_workload
from sglang_moelb.ab.workload_file import file_workload

ROOT = Path(__file__).resolve().parents[2]
WRITER = "benchmarks.probe.workload"
PHOTO_EVERY = 20  # one request in twenty shows photographs, of other sizes, without an answer
WRITER_TIMEOUT_S = 120.0


def find_checkpoint(root: Path = ROOT) -> Path | None:
    """The folder of the trained probe in the repository at `root`, or None where it is not."""
    folder = root / "benchmarks" / "probe" / "checkpoint"
    return folder if (folder / "config.json").is_file() else None


def probe_workload(
    num_requests: int, *, seed: int, out: Path, root: Path = ROOT
) -> tuple[Request, ...]:
    """Test items of the probe, the tasks taking turns, and photographs among them, shuffled.

    The items are written to `out`. Equal arguments give equal requests. Raises `AbError` if the
    writer fails.
    """
    num_photos = num_requests // PHOTO_EVERY
    items = _items(num_requests - num_photos, seed, out, root)
    shown = demo_workload(2 * num_photos, seed=seed) if num_photos else ()
    photos = [request for request in shown if request.kind == "image"][:num_photos]
    requests = [*items, *photos]
    random.Random(seed).shuffle(requests)
    return tuple(replace(request, request_id=i) for i, request in enumerate(requests))


def _items(num_items: int, seed: int, out: Path, root: Path) -> tuple[Request, ...]:
    out = out.resolve()
    command = [sys.executable, "-m", WRITER, "--out", str(out)]
    command += ["--items", str(num_items), "--seed", str(seed)]
    try:
        subprocess.run(
            command, cwd=root, capture_output=True, text=True, timeout=WRITER_TIMEOUT_S, check=True
        )
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout).strip() or f"exit code {error.returncode}"
        raise AbError(f"the probe's items could not be written to {out}:\n{said}") from error
    except subprocess.TimeoutExpired as error:
        raise AbError(
            f"the probe's items were not written to {out} in {error.timeout:.0f} s. Run it alone: "
            f"cd {root} && {' '.join(command)}"
        ) from error
    return file_workload(out)
