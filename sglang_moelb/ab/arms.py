"""Arms from the command line, their order, and the commands that start their servers."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from urllib.parse import urlsplit

from sglang_moelb.ab.types import AbError, Arm, Plan

DEFAULT_ARMS = ("stock=", "auto=--moelb-mode auto")
HOST = "127.0.0.1"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}")


def parse_arms(arm_texts: Sequence[str], url_texts: Sequence[str]) -> tuple[Arm, ...]:
    """Arms of `--arm NAME=FLAGS` and `--url NAME=URL`; the first is what others are compared with.

    Without any, the default arms. Arms come before urls unless a name is in both: then the arm's
    flags only say how that running server was started. Raises `AbError`.
    """
    texts = arm_texts or ([] if url_texts else DEFAULT_ARMS)
    flags = dict(_named(text, "--arm") for text in _once(texts, "--arm"))
    urls = dict(_named(text, "--url") for text in _once(url_texts, "--url"))
    arms = [
        Arm(name=name, flags=_split(name, text), url=_url(name, urls.get(name)))
        for name, text in flags.items()
    ]
    arms += [Arm(name=name, url=_url(name, url)) for name, url in urls.items() if name not in flags]
    if len(arms) < 2:
        raise AbError(
            f"--arm: a comparison needs two arms, found {len(arms)} "
            f"({', '.join(arm.name for arm in arms)}). Give another --arm NAME=FLAGS or --url."
        )
    return tuple(arms)


def session_order(arms: Sequence[Arm], order: str) -> tuple[str, ...]:
    """Names of arms, one a session: `AB` drives each arm once, `ABBA` forth and back.

    In `ABBA` the arm in the middle keeps its server for both of its sessions.
    """
    names = [arm.name for arm in arms]
    if order == "AB":
        return tuple(names)
    if order == "ABBA":
        return tuple(names + names[::-1])
    raise AbError(f"--order {order}: use AB (each arm once) or ABBA (forth and back).")


def server_command(plan: Plan, arm: Arm, port: int) -> list[str]:
    """The command that starts `arm`; flags given later count, so an arm overrides common flags."""
    flags = ["--model-path", plan.model, "--host", HOST, "--port", str(port)]
    flags += ["--random-seed", str(plan.seed)]
    if not plan.prefix_cache:
        flags.append("--disable-radix-cache")
    own = [*plan.common_flags, *arm.flags]
    if not _has(own, "--tool-call-parser") and not _has(own, "--reasoning-parser"):
        # A token that is only part of a character has no text yet, and SGLang then leaves its
        # log-probability out of the stream unless a parser is set. No request uses tools.
        flags += ["--tool-call-parser", "qwen25"]
    flags += own
    if not plan.cpu:
        return [sys.executable, "-m", "sglang.launch_server", *flags]
    launcher = [sys.executable, "-m", "sglang_moelb.ep.standin.launch"]
    return [*launcher, "--ranks", str(plan.num_ranks), "--", *flags]


def _has(flags: Sequence[str], name: str) -> bool:
    return any(flag == name or flag.startswith(name + "=") for flag in flags)


def _named(text: str, option: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not _NAME.fullmatch(name):
        raise AbError(
            f"{option} {text!r}: must be NAME=VALUE, the name of letters, digits, dot, dash and "
            "underscore, at most 32."
        )
    return name, value


def _once(texts: Sequence[str], option: str) -> Sequence[str]:
    names = [text.partition("=")[0] for text in texts]
    for name in names:
        if names.count(name) > 1:
            raise AbError(f"{option} {name}: given {names.count(name)} times. Give each arm once.")
    return texts


def _split(name: str, text: str) -> tuple[str, ...]:
    try:
        flags = tuple(shlex.split(text))
    except ValueError as error:
        raise AbError(f"--arm {name}: the flags cannot be split ({error}): {text}") from error
    if flags and not flags[0].startswith("-"):
        raise AbError(
            f"--arm {name}: {flags[0]!r} is not a flag. Write --arm '{name}=--flag value'."
        )
    return flags


def _url(name: str, text: str | None) -> str | None:
    if text is None:
        return None
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise AbError(
            f"--url {name}={text}: not an address. Example: {name}=http://127.0.0.1:30000"
        )
    return text.rstrip("/")
