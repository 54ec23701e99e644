"""The `--moelb-*` flags of SGLang's server: declared, shown in its help, read into one `Config`."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

from sglang_moelb import config as configuration
from sglang_moelb.config import Config, ConfigError
from sglang_moelb.hot_config import refuse_beside_resident
from sglang_moelb.placement import PlacementError
from sglang_moelb.placement import load as load_placement
from sglang_moelb.types import MODES

SERVE_BACKEND_API_VERSION = 1  # of SGLang's interface that `serve_backend` is written for

SHORTCUTS: dict[str, tuple[str, type, str]] = {
    "moelb_capacity_factor": (
        "capacity.factor",
        float,
        "capacity of a rank or expert for drop and expand, as a multiple of the mean load",
    ),
    "moelb_capacity_level": ("capacity.level", str, "what a capacity holds for: expert or device"),
    "moelb_min_batch_tokens": (
        "capacity.min_batch_tokens",
        int,
        "passes with fewer tokens over all ranks are left alone",
    ),
    "moelb_quality_budget": (
        "controller.quality_budget",
        float,
        "share of routed gate mass that lossy levers may lose over the quality window",
    ),
    "moelb_min_gain": (
        "controller.min_gain",
        float,
        "predicted share of step time below which mode auto does nothing",
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags. Their default is None: not given, so the plugin stays out."""
    group = parser.add_argument_group(
        "sglang_moelb", "MoE load balancing. Without one of these flags the plugin does nothing."
    )
    group.add_argument(
        "--moelb-mode",
        choices=MODES,
        default=None,
        help="none: ready, but leave routing alone (default once any flag is given); observe: "
        "measure and say what auto would do; expand, drop: always that lever; auto: the "
        "controller chooses for each pass; downgrade, replicate: always that lever.",
    )
    group.add_argument(
        "--moelb-config",
        metavar="FILE|JSON",
        default=None,
        help="JSON file, or JSON text that starts with '{', with any of the knobs "
        f"{', '.join(configuration.knobs())}. The other --moelb flags are laid over it.",
    )
    group.add_argument(
        "--moelb-trace",
        metavar="DIR",
        default=None,
        help="write a record of every prefill pass to this folder, for `moelb replay DIR`; one "
        "server a folder, about 1.5 kB a MoE layer and pass at 128 experts (default: no trace).",
    )
    group.add_argument(
        "--moelb-verdict",
        action="store_true",
        default=None,
        help="keep score of what each lever would have gained and cost, and say whether to turn "
        "one on, in /moelb/status and in a log line a minute; works in every mode, best begun "
        "with --moelb-mode observe (knob verdict.enabled, default off).",
    )
    group.add_argument(
        "--moelb-trace-tokens",
        metavar="N",
        type=int,
        default=None,
        help="with --moelb-trace: every rank also writes the routing of each token of one prefill "
        "pass of N to that folder, about 2 bytes a token, layer and chosen expert (default: 0, "
        "none).",
    )
    defaults = configuration.flat(Config())
    for name, (knob, kind, meaning) in SHORTCUTS.items():
        flag = "--" + name.replace("_", "-")
        text = f"{meaning} (knob {knob}, default {defaults[knob]})".replace("%", "%%")
        group.add_argument(flag, type=kind, default=None, help=text)


def config_of(args: argparse.Namespace) -> Config | None:
    """The configuration that the flags ask for, or None if none was given.

    Raises `ConfigError` on a wrong value.
    """
    given = {k: v for k, v in vars(args).items() if k.startswith("moelb_") and v is not None}
    if not given:
        return None
    tree = configuration.load(given["moelb_config"]) if "moelb_config" in given else {}
    config = configuration.merge(Config(), tree)
    for name, (knob, _, _) in SHORTCUTS.items():
        if name in given:
            config = _with_flag(config, name, knob, given[name])
    last: dict[str, Any] = {"mode": given["moelb_mode"]} if "moelb_mode" in given else {}
    if "moelb_verdict" in given:
        last["verdict"] = {"enabled": True}
    config = configuration.merge(config, last)
    refuse_beside_resident(config)
    return config


def _with_flag(config: Config, name: str, knob: str, value: Any) -> Config:
    section, key = knob.split(".")
    try:
        return configuration.merge(config, {section: {key: value}})
    except ConfigError as error:
        raise ConfigError(f"--{name.replace('_', '-')} {value}: {error}") from error


def take_arguments(args: argparse.Namespace) -> None:
    """Read the flags, hand them to the processes to come and install the remaining seams.

    Ends the process with one clear line when a flag is wrong.
    """
    try:
        config = config_of(args)
        tokens = 0 if config is None else _trace_tokens(args)
        if config is not None and config.resident.placement:
            load_placement(Path(config.resident.placement))
    except (ConfigError, PlacementError) as error:
        sys.exit(f"sglang_moelb: {error}")
    if config is None:
        return
    from sglang_moelb.ep import install

    install.refuse_unsupported_flags(args)
    install.refuse_taken_port(args)
    configuration.to_environment(config, args.moelb_trace, tokens)
    install.install_in_main()


def _trace_tokens(args: argparse.Namespace) -> int:
    tokens: int = args.moelb_trace_tokens or 0
    if tokens < 0:
        raise ConfigError(f"--moelb-trace-tokens {tokens}: use 0 (none) or a number of passes")
    if tokens and not args.moelb_trace:
        raise ConfigError(
            f"--moelb-trace-tokens {tokens}: needs a folder to write to; add --moelb-trace DIR"
        )
    return tokens


def serve_backend() -> Any:
    """Entry point of SGLang's group `sglang.serve_backends`: `sglang serve --model-type moelb`.

    SGLang's language-model server itself. SGLang prints `sglang serve --help` before it loads
    plugins, so on an unpatched one that help cannot have our flags; it names this backend, and
    `sglang serve --model-type moelb --help` has them. Takes no part in choosing a backend.
    """
    from sglang.cli.serve_backends import ServeBackend

    return ServeBackend(api_version=SERVE_BACKEND_API_VERSION, run=_serve)


def _serve(request: Any) -> None:
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    load_plugins()
    if {"-h", "--help"} & set(request.argv):
        with contextlib.suppress(SystemExit):  # argparse leaves after help; SGLang has more to say
            prepare_server_args(["--help"])
        return
    run_server(prepare_server_args(list(request.argv)))
