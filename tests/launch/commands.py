"""What the scripts of `launch/` would run, by asking them (`DRY_RUN=1`)."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
SCRIPTS = ("serve_stock", "serve_moelb", "ab", "prefill", "decode")
RECIPES = tuple(sorted(path.stem for path in (LAUNCH / "recipes").glob("*.env")))
KEYS = (
    "MODEL",
    "DEVICE",
    "RANKS",
    "TINY",
    "FLAGS",
    "MOELB_FLAGS",
    "PREFILL_FLAGS",
    "DECODE_FLAGS",
)
ROLE_KEYS = {"prefill": "PREFILL_FLAGS", "decode": "DECODE_FLAGS"}


def recipe_values(recipe: str) -> dict[str, str]:
    """KEY=VALUE lines of a recipe; comments left out."""
    lines = (LAUNCH / "recipes" / f"{recipe}.env").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def fits(script: str, recipe: str) -> bool:
    """Whether the recipe has what the script's role needs."""
    return script not in ROLE_KEYS or ROLE_KEYS[script] in recipe_values(recipe)


def run(script: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a script as a user would, printing instead of starting."""
    return subprocess.run(
        ["bash", str(LAUNCH / f"{script}.sh"), *args],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "DRY_RUN": "1", **env},
    )


def command(script: str, recipe: str, *args: str) -> list[str]:
    """The words of the command that the script would run."""
    done = run(script, recipe, *args)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)
