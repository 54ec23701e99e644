"""Entry points of the group `sglang.srt.plugins`."""

from __future__ import annotations

from sglang_moelb import config


def register() -> None:
    """Install the seams; does nothing but declare flags unless a --moelb flag was given."""
    from sglang_moelb.ep import install

    install.install()


def register_standin() -> None:
    """Make SGLang's DeepEP path run on CPU, if the environment asks for it."""
    if config.standin_requested():
        from sglang_moelb.ep.standin import hooks

        hooks.register()
