"""Check every seam, then install the hooked form where SGLang is not patched, or end the process.

SGLang's plugin loader logs and swallows every exception but SystemExit, so a balancer that could
not be installed would silently not balance. Everything that is wrong here ends the process with
what was expected and what was found.
"""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from sglang_moelb import config as configuration
from sglang_moelb.ep import hooks, seams
from sglang_moelb.ep.seams import Finding, Form

SGLANG_VERSION = "0.5.23"
FLAG_SEAMS = ("flags", "parsed-flags")
MAIN_SEAMS = ("http", "request")
DETOKENIZER_MODULE = "sglang.srt.managers.detokenizer_manager"


def install() -> None:
    """Entry point of SGLang's plugin loader; runs in every process of a server.

    In the launching process only the flags are installed: they decide about the rest. In a spawned
    process the configuration is in the environment.
    """
    findings = verified_findings()
    form = seams.form_of(findings)
    _install_hooks(form, FLAG_SEAMS)
    if configuration.from_environment() is None:
        return
    if DETOKENIZER_MODULE in sys.modules and "sglang.srt.managers.scheduler" not in sys.modules:
        return
    others = [s.name for s in seams.SEAMS if s.name not in (*FLAG_SEAMS, *MAIN_SEAMS)]
    _install_hooks(form, tuple(others))


def install_in_main() -> None:
    """Install what the launching process needs once the flags have asked for the plugin."""
    _install_hooks(seams.form_of(verified_findings()), MAIN_SEAMS)


def verified_findings() -> list[Finding]:
    """The findings of all seams; ends the process with a table if one does not hold."""
    try:
        found = version("sglang")
    except PackageNotFoundError:
        sys.exit("sglang_moelb: SGLang is not installed; pip install sglang==" + SGLANG_VERSION)
    root = seams.sglang_root()
    if root is None or found != SGLANG_VERSION:
        sys.exit(
            f"sglang_moelb: expected SGLang {SGLANG_VERSION}, found {found}. Install "
            f"sglang=={SGLANG_VERSION}, or uninstall sglang-moelb to use this SGLang."
        )
    findings = seams.check(root)
    wrong = [f for f in findings if f.problem]
    if wrong:
        sys.exit("sglang_moelb: SGLang's source is not what it must be.\n" + table(wrong))
    if seams.form_of(findings) is None:
        half = [f for f in findings if f.form == "hook"]
        sys.exit(
            "sglang_moelb: SGLang is patched in part: these seams lack their patch. Run "
            "'moelb patch status', then 'moelb patch revert' and 'moelb patch apply'.\n"
            + table(half)
        )
    return findings


def table(findings: list[Finding]) -> str:
    """Expected and found, one seam a paragraph, for people."""
    lines: list[str] = []
    for finding in findings:
        lines += [
            f"  {finding.seam.name}: {finding.problem or finding.form} in {finding.seam.module}",
            f"    expected {finding.expected}",
            f"    found    {finding.found}",
        ]
    return "\n".join(lines)


def refuse_unsupported_flags(args: argparse.Namespace) -> None:
    """End the process if SGLang's own flags ask for what we cannot balance, naming flag and fix."""
    for flag, wrong, reason in _refusals(args):
        if wrong:
            sys.exit(f"sglang_moelb: {flag}: {reason}. Or start without the --moelb flags.")


def refuse_taken_port(args: argparse.Namespace) -> None:
    """End the process if another one listens on the server's port, before a weight is loaded.

    SGLang notices after it has loaded the model.
    """
    host, port = args.host, args.port
    if args.node_rank:
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            sys.exit(
                f"sglang_moelb: --host {host} --port {port}: cannot listen there "
                f"({error.strerror}). Choose another --port, or end the process that listens."
            )


def _refusals(args: argparse.Namespace) -> list[tuple[str, bool, str]]:
    def given(name: str) -> object:
        return getattr(args, name, None)

    return [
        (
            f"--moe-a2a-backend {given('moe_a2a_backend')}",
            given("moe_a2a_backend") != "deepep",
            "levers act on DeepEP's all-to-all; use --moe-a2a-backend deepep",
        ),
        (
            f"--tp-size {given('tp_size')}",
            given("tp_size") == 1,
            "expert parallelism of one rank has nothing to balance; use --tp-size 2 or more",
        ),
        (
            "--deepep-mode low_latency",
            given("deepep_mode") == "low_latency" and given("disaggregation_mode") != "decode",
            "levers act in prefill, which needs --deepep-mode normal or auto",
        ),
        (
            "--deepep-mode auto",
            given("deepep_mode") == "auto"
            and given("disaggregation_mode") != "decode"
            and _captures_prefill(args),
            "SGLang then captures prefill in CUDA graphs, which levers cannot act in; use "
            "--deepep-mode normal, or add --disable-prefill-cuda-graph",
        ),
        (
            f"--speculative-algorithm {given('speculative_algorithm')}",
            bool(given("speculative_algorithm")),
            "drafts and their verification are not told from prefill yet; leave the flag out",
        ),
        (
            "--enable-pdmux",
            bool(given("enable_pdmux")),
            "prefills that run in parts are not supported yet; leave the flag out",
        ),
        (
            "--enable-two-batch-overlap",
            bool(given("enable_two_batch_overlap")),
            "two micro-batches a layer are not supported yet; leave the flag out",
        ),
        *_renaming_refusals(given),
        (
            f"--tokenizer-worker-num {given('tokenizer_worker_num')}",
            (given("tokenizer_worker_num") or 1) != 1,
            "/moelb/status needs one tokenizer worker; leave the flag out",
        ),
    ]


def _renaming_refusals(given: Callable[[str], object]) -> list[tuple[str, bool, str]]:
    """What makes SGLang's numbers of the chosen experts other than the model's."""
    location = given("init_expert_location") or "trivial"
    redundant = given("ep_num_redundant_experts")
    return [
        (
            "--enable-eplb",
            bool(given("enable_eplb")),
            "EPLB renames experts while it runs; leave the flag out",
        ),
        (
            f"--init-expert-location {location}",
            location != "trivial",
            "SGLang then renames the chosen experts but not the router's scores, which levers and "
            "traces read together; leave the flag out",
        ),
        (
            f"--ep-num-redundant-experts {redundant}",
            bool(redundant),
            "redundant experts are not supported yet; leave the flag out",
        ),
    ]


def _captures_prefill(args: argparse.Namespace) -> bool:
    """Whether SGLang captures prefill in CUDA graphs in DeepEP's mode auto.

    A named backend wins over the flags that switch graphs off.
    """
    backend = getattr(args, "cuda_graph_backend_prefill", None)
    if backend is not None:
        return str(getattr(backend, "value", backend)) != "disabled"
    return not (
        getattr(args, "disable_cuda_graph", False)
        or getattr(args, "disable_prefill_cuda_graph", False)
    )


def _install_hooks(form: Form | None, names: tuple[str, ...]) -> None:
    if form != "hook":
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for seam in seams.SEAMS:
        if seam.name in names and seam.target not in HookRegistry._patched:
            kind, hook = hooks.HOOKS[seam.name]
            HookRegistry.register(seam.target, hook, HookType[kind])
    HookRegistry.apply_hooks()
    for seam in seams.SEAMS:
        if seam.name in names and seam.target not in HookRegistry._patched:
            sys.exit(f"sglang_moelb: SGLang did not install our hook on {seam.target}; its log "
                     "says why")
