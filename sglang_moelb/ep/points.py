"""The functions that SGLang calls: one per seam, the same for the patched and the hooked form.

Light to import (no SGLang, no torch), and every function returns at once while no runtime is
attached, so that an SGLang with our patches and without our flags behaves as if unpatched.
`passed.num_passed` counts how often each seam was passed through.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_moelb.ep.passed import num_passed
from sglang_moelb.ep.refusal import check_refusal

if TYPE_CHECKING:
    import argparse

    from sglang_moelb.ep.runtime import Runtime

_attached: list[Runtime] = []


def attached() -> Runtime | None:
    """The runtime of this process, or None."""
    return _attached[0] if _attached else None


def attach(runtime: Runtime) -> None:
    """Make `runtime` the one that the seams of this process drive."""
    _attached[:] = [runtime]


def detach() -> None:
    """Let the seams do nothing again."""
    _attached.clear()
    num_passed.clear()


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    """Seam `flags`: add the `--moelb-*` flags to SGLang's parser."""
    from sglang_moelb.ep import flags

    flags.add_arguments(parser)


def take_cli_args(args: argparse.Namespace) -> None:
    """Seam `parsed-flags`: read the `--moelb-*` flags; ends the process on a wrong value."""
    from sglang_moelb.ep import flags

    flags.take_arguments(args)


def model_loaded(model_runner: Any) -> None:
    """Seam `model-loaded`: attach to a model whose weights have just been loaded."""
    from sglang_moelb import config

    wanted = config.from_environment()
    if wanted is None or model_runner.is_draft_worker:
        return
    from sglang_moelb.ep import start

    num_passed["model-loaded"] += 1
    start.attach_to(model_runner, wanted)


def new_batch(forward_batch: Any, batch: Any) -> None:
    """Seam `new-batch`: note which requests of a batch refuse lossy levers."""
    if _attached:
        num_passed["new-batch"] += 1
        _attached[0].note_requests(forward_batch, batch)


def begin_pass(model_runner: Any, forward_batch: Any) -> None:
    """Seam `begin-pass`: agree on a policy and take the modality mask before ids are clamped."""
    if _attached:
        num_passed["begin-pass"] += 1
        _attached[0].begin_pass(forward_batch)


def end_pass(model_runner: Any) -> None:
    """Seam `end-pass`: close the pass and hand its record to the controller."""
    if _attached:
        num_passed["end-pass"] += 1
        _attached[0].end_pass()


def before_dispatch(dispatcher: Any, hidden_states: Any, topk_output: Any) -> Any:
    """Seam `dispatch`: observe, exchange, plan and apply; returns the top-k output to dispatch."""
    if not _attached:
        return topk_output
    num_passed["dispatch"] += 1
    return _attached[0].before_dispatch(dispatcher, hidden_states, topk_output)


def run_experts(layer: Any, dispatch_output: Any) -> Any:
    """Seam `experts`: the rows have arrived; None where SGLang is to run the grouped GEMM."""
    if not _attached:
        return None
    num_passed["experts"] += 1
    return _attached[0].run_experts(layer, dispatch_output)


def after_experts(dispatcher: Any) -> None:
    """Seam `combine`: the grouped GEMM is done, the rows go home."""
    if _attached:
        num_passed["combine"] += 1
        _attached[0].after_experts()


def after_combine(dispatcher: Any) -> None:
    """Seam `combined`: a MoE layer is complete."""
    if _attached:
        num_passed["combined"] += 1
        _attached[0].after_combine()


def add_internal_state(state: dict[str, Any]) -> None:
    """Seam `state`: add our status to what SGLang's schedulers answer."""
    if _attached:
        num_passed["state"] += 1
        state["moelb"] = _attached[0].status()


def take_internal_state(request: Any) -> None:
    """Seam `set-state`: take our knobs out of a state update and apply them."""
    if _attached:
        num_passed["set-state"] += 1
        request.server_args = _attached[0].take_update(request.server_args)


def check_request(request: Any, input_ids: list[int] | None) -> None:
    """Seam `request`: ValueError, which SGLang answers with 400, for what cannot be served.

    That is a prompt without tokens, and a refusal of lossy levers that is neither true nor false.
    """
    num_passed["request"] += 1
    if input_ids is not None and not len(input_ids) and request.input_embeds is None:
        raise ValueError(
            "the prompt has no tokens; send a text, or input_ids, of at least one token"
        )
    check_refusal((getattr(request, "sampling_params", None) or {}).get("custom_params"))


def serve_http(app: Any, tokenizer_manager: Any) -> None:
    """Seam `http`: add `/moelb/*` to SGLang's HTTP server."""
    from sglang_moelb import config

    wanted = config.from_environment()
    if wanted is None:
        return
    from sglang_moelb.ep import http

    num_passed["http"] += 1
    http.add_routes(app, tokenizer_manager, wanted)
