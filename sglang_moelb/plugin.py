"""Entry points of the groups `sglang.srt.plugins` and `sglang.serve_backends`."""

from __future__ import annotations

from typing import Any

from sglang_moelb import environment


def register() -> None:
    """Install the seams; does nothing but declare flags unless a --moelb flag was given."""
    from sglang_moelb.ep import install

    install.install()


def serve_backend() -> Any:
    """The backend `moelb` of `sglang serve`: SGLang's own server, with our flags in its help."""
    from sglang_moelb.ep import flags

    return flags.serve_backend()


def register_standin() -> None:
    """Make SGLang's DeepEP path run on CPU, if the environment asks for it."""
    if environment.standin_requested():
        from sglang_moelb.ep.standin import hooks

        hooks.register()
