"""The console command `moelb`; each sub-command lives with what it does."""

from __future__ import annotations

import typer


def build() -> typer.Typer:
    """The command line with all sub-commands."""
    from sglang_moelb.ab.cli import ab
    from sglang_moelb.doctor.cli import doctor
    from sglang_moelb.patching.cli import app as patch

    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        help="Load balancing of Mixture-of-Experts serving on SGLang.",
    )
    app.add_typer(patch, name="patch")
    app.command("ab")(ab)
    app.command("doctor")(doctor)
    return app


def main() -> None:
    """Run the command line."""
    build()()
