"""The console command `moelb`; each sub-command lives with what it does."""

from __future__ import annotations

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Load balancing of Mixture-of-Experts serving on SGLang.",
)


def main() -> None:
    """Run the command line."""
    from sglang_moelb.patching.cli import app as patch_app

    app.add_typer(patch_app, name="patch")
    app()
