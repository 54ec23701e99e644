"""Every symbol of SGLang that we touch, one row each, and the check that it is what we expect.

A seam has two forms that lead to the same function of `ep.points`: a one-line call in SGLang's own
source (the patch set) or a plugin hook. Exactly one form is active; the check reads SGLang's source
without importing it, so it can run in every process before anything is installed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

Form = Literal["hook", "patch"]
Moment = Literal["main", "load", "prefill", "on-demand"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Seam:
    """One touched symbol.

    `params` are the parameter names it must have, in order; `moment` says when it must have been
    passed through: in the launching process, at model load, by the first prefill, or on demand.
    """

    name: str
    module: str
    symbol: str
    point: str
    params: tuple[str, ...]
    patch: str
    moment: Moment
    why: str
    until: str

    @property
    def target(self) -> str:
        """Dotted name for SGLang's hook registry."""
        return f"{self.module}.{self.symbol}"

    @property
    def call(self) -> str:
        """What the patched source contains."""
        return f"moelb_points.{self.point}("


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What the check found for one seam; `problem` is empty where it holds."""

    seam: Seam
    form: Form
    problem: str
    expected: str
    found: str


_UPSTREAM = "SGLang offers a load-balancer interface at this place"
_DEEPEP = "sglang.srt.layers.moe.token_dispatcher.deepep"
_RUNNER = "sglang.srt.model_executor.model_runner"
_STATE = "sglang.srt.managers.scheduler_components.internal_state"

SEAMS: tuple[Seam, ...] = (
    Seam(
        name="flags",
        module="sglang.srt.server_args",
        symbol="ServerArgs.add_cli_args",
        point="add_cli_args",
        params=("parser",),
        patch="add-moelb-flags.patch",
        moment="main",
        why="declare the --moelb flags",
        until="SGLang lets plugins add flags",
    ),
    Seam(
        name="parsed-flags",
        module="sglang.srt.server_args",
        symbol="ServerArgs.from_cli_args",
        point="take_cli_args",
        params=("cls", "args"),
        patch="add-moelb-flags.patch",
        moment="main",
        why="read the --moelb flags",
        until="SGLang lets plugins add flags",
    ),
    Seam(
        name="model-loaded",
        module=_RUNNER,
        symbol="ModelRunner.load_model",
        point="model_loaded",
        params=("self",),
        patch="call-moelb-around-a-pass.patch",
        moment="load",
        why="find the MoE layers and start, before the KV cache is sized",
        until=_UPSTREAM,
    ),
    Seam(
        name="new-batch",
        module="sglang.srt.model_executor.forward_batch_info",
        symbol="ForwardBatch.init_new",
        point="new_batch",
        params=(
            "cls",
            "batch",
            "model_runner",
            "capture_hidden_mode",
            "return_hidden_states_before_norm",
            "extend_position_info",
            "spec_mrope_positions",
            "kv_loc_plan",
            "write_cols",
        ),
        patch="call-moelb-around-a-pass.patch",
        moment="prefill",
        why="requests that refuse lossy levers, and decode rows, are known here",
        until=_UPSTREAM,
    ),
    Seam(
        name="begin-pass",
        module=_RUNNER,
        symbol="ModelRunner._prepare_eager_forward_batch",
        point="begin_pass",
        params=("self", "forward_batch"),
        patch="call-moelb-around-a-pass.patch",
        moment="prefill",
        why="agree on a policy; see token ids after padding and before clamping",
        until=_UPSTREAM,
    ),
    Seam(
        name="end-pass",
        module=_RUNNER,
        symbol="ModelRunner._forward_raw",
        point="end_pass",
        params=(
            "self",
            "forward_batch",
            "pp_proxy_tensors",
            "reinit_attn_backend",
            "split_forward_count",
        ),
        patch="call-moelb-around-a-pass.patch",
        moment="prefill",
        why="close the pass and its record",
        until=_UPSTREAM,
    ),
    Seam(
        name="dispatch",
        module=_DEEPEP,
        symbol="DeepEPDispatcher.dispatch_a",
        point="before_dispatch",
        params=("self", "hidden_states", "topk_output"),
        patch="call-moelb-at-dispatch-and-combine.patch",
        moment="prefill",
        why="read and rewrite ids and weights before the all-to-all",
        until=_UPSTREAM,
    ),
    Seam(
        name="experts",
        module="sglang.srt.layers.moe.fused_moe_triton.layer",
        symbol="FusedMoE.run_moe_core",
        point="run_experts",
        params=("self", "dispatch_output"),
        patch="call-moelb-to-run-experts.patch",
        moment="prefill",
        why="the grouped GEMM begins: its time, and its precision",
        until=_UPSTREAM,
    ),
    Seam(
        name="combine",
        module=_DEEPEP,
        symbol="DeepEPDispatcher.combine_a",
        point="after_experts",
        params=("self", "combine_input"),
        patch="call-moelb-at-dispatch-and-combine.patch",
        moment="prefill",
        why="the grouped GEMM has ended",
        until=_UPSTREAM,
    ),
    Seam(
        name="combined",
        module=_DEEPEP,
        symbol="DeepEPDispatcher.combine_b",
        point="after_combine",
        params=("self",),
        patch="call-moelb-at-dispatch-and-combine.patch",
        moment="prefill",
        why="the layer has ended",
        until=_UPSTREAM,
    ),
    Seam(
        name="state",
        module=_STATE,
        symbol="SchedulerInternalStateController.get_internal_state",
        point="add_internal_state",
        params=("self", "recv_req"),
        patch="call-moelb-in-server-state.patch",
        moment="on-demand",
        why="status in /server_info and /moelb/status",
        until="SGLang lets plugins contribute to the internal state",
    ),
    Seam(
        name="set-state",
        module=_STATE,
        symbol="SchedulerInternalStateController.set_internal_state",
        point="take_internal_state",
        params=("self", "recv_req"),
        patch="call-moelb-in-server-state.patch",
        moment="on-demand",
        why="hot changes of the configuration",
        until="SGLang lets plugins take state updates",
    ),
    Seam(
        name="http",
        module="sglang.srt.entrypoints.http_server",
        symbol="_setup_and_run_http_server",
        point="serve_http",
        params=(
            "server_args",
            "tokenizer_manager",
            "template_manager",
            "port_args",
            "scheduler_infos",
            "subprocess_watchdog",
            "execute_warmup_func",
            "launch_callback",
        ),
        patch="call-moelb-in-server-state.patch",
        moment="main",
        why="GET /moelb/status and POST /moelb/config",
        until="SGLang lets plugins add routes",
    ),
    Seam(
        name="request",
        module="sglang.srt.managers.tokenizer_manager",
        symbol="TokenizerManager._validate_one_request",
        point="check_request",
        params=("self", "obj", "input_ids"),
        patch="call-moelb-with-each-request.patch",
        moment="main",
        why="a prompt without tokens keeps the scheduler from answering anything",
        until="SGLang refuses such a prompt itself",
    ),
)


def sglang_root() -> Path | None:
    """Folder of the installed `sglang` package, found without importing it."""
    spec = find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def check(root: Path, seams: Iterable[Seam] = SEAMS) -> list[Finding]:
    """Compare each seam with the SGLang source under `root` (the `sglang` folder)."""
    return [_check_one(root, seam) for seam in seams]


def form_of(findings: Iterable[Finding]) -> Form | None:
    """The form that is active, or None if patched and unpatched seams are mixed."""
    forms = {finding.form for finding in findings}
    return forms.pop() if len(forms) == 1 else None


def _check_one(root: Path, seam: Seam) -> Finding:
    path = root.joinpath(*seam.module.split(".")[1:]).with_suffix(".py")
    expected = f"{seam.symbol}({', '.join(seam.params)})"
    if not path.is_file():
        return Finding(seam=seam, form="hook", problem="no such module", expected=seam.module,
                       found="nothing")
    source = path.read_text(encoding="utf-8")
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        return Finding(seam=seam, form="hook", problem="not Python", expected=expected,
                       found=str(error))
    node = _find(tree, seam.symbol.split("."))
    if node is None:
        return Finding(seam=seam, form="hook", problem="no such function", expected=expected,
                       found="nothing")
    form: Form = "patch" if seam.call in (ast.get_source_segment(source, node) or "") else "hook"
    found = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    problem = "" if tuple(found) == seam.params else "other parameters"
    return Finding(seam=seam, form=form, problem=problem, expected=expected,
                   found=f"{seam.symbol}({', '.join(found)})")


def _find(tree: ast.AST, names: list[str]) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    for node in ast.iter_child_nodes(tree):
        if getattr(node, "name", None) != names[0]:
            continue
        if len(names) > 1:
            return _find(node, names[1:])
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return node
    return None
