"""The console command `moelb`; each sub-command lives with what it does."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import typer

AB_NEEDS = ("aiohttp", "jinja2", "matplotlib", "PIL", "skimage", "sklearn")


def build() -> typer.Typer:
    """The command line with all sub-commands; `ab` only says what to install if it cannot run."""
    from sglang_moelb.calibrate.cli import calibrate
    from sglang_moelb.doctor.cli import doctor
    from sglang_moelb.live.cli import top
    from sglang_moelb.patching.cli import app as patch
    from sglang_moelb.replay.cli import replay, synthesise

    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        help="Load balancing of Mixture-of-Experts serving on SGLang.",
    )
    app.add_typer(patch, name="patch")
    app.command("doctor")(doctor)
    app.command("top")(top)
    app.command("replay")(replay)
    app.command("synthesise")(synthesise)
    app.command("calibrate")(calibrate)
    if all(find_spec(name) for name in AB_NEEDS):
        from sglang_moelb.ab.cli import ab

        app.command("ab")(ab)
    else:
        app.command("ab", help="Compare servers (pip install 'sglang-moelb[ab]' first).")(_no_ab)
    return app


def main() -> None:
    """Run the command line."""
    build()()


def _no_ab() -> None:
    missing = [name for name in AB_NEEDS if not find_spec(name)]
    sys.exit(f"moelb ab: {', '.join(missing)} missing; pip install 'sglang-moelb[ab]'")
