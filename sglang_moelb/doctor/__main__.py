"""`python -m sglang_moelb.doctor`: the command `moelb doctor` where the rest cannot be imported."""

from __future__ import annotations

import typer

from sglang_moelb.doctor.cli import doctor

if __name__ == "__main__":
    typer.run(doctor)
