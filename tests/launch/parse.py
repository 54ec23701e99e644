"""Run as a program: SGLang's own parser, with our flags on it, over command lines from stdin.

Reads a JSON list of argument lists; writes, after a line `ANSWERS`, a JSON list with
`{"args": {...}, "mode": our mode or null}` or `{"error": text}` for each. A process of its own,
because SGLang imports without a GPU only in the stand-in's environment.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from typing import Any

from sglang.srt.server_args import ServerArgs

from sglang_moelb.ep import flags, install

WANTED = ("tp_size", "attn_dp_size", "disaggregation_mode", "deepep_mode", "model_path")


def make_parser() -> argparse.ArgumentParser:
    """SGLang's parser with our flags, which a patched SGLang has already."""
    parser = argparse.ArgumentParser(prog="sglang serve")
    ServerArgs.add_cli_args(parser)
    if "--moelb-mode" not in parser.format_help():
        flags.add_arguments(parser)
    return parser


def answer(parser: argparse.ArgumentParser, words: list[str]) -> dict[str, Any]:
    """What the server would have read, or why it would not have started."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args = parser.parse_args(words)
            config = flags.config_of(args)
            if config is not None:
                install.refuse_unsupported_flags(args)
    except SystemExit as error:
        return {"error": f"{error} {said.getvalue()}"}
    return {
        "args": {name: getattr(args, name) for name in WANTED},
        "mode": config.mode if config else None,
    }


if __name__ == "__main__":
    made = make_parser()
    answers = [answer(made, words) for words in json.load(sys.stdin)]
    print("ANSWERS")
    print(json.dumps(answers))
