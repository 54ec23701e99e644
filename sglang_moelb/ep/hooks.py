"""The hooked form of each seam: adapts SGLang's hook signatures to the functions of `ep.points`.

Used only on an unpatched SGLang. Hooks bind by name where they must and pass everything else on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_moelb.ep import points

Kind = str  # a member name of sglang's HookType: "BEFORE", "AFTER" or "AROUND"


def _flags(result: None, parser: Any) -> None:
    points.add_cli_args(parser)


def _parsed_flags(cls: type, args: Any) -> None:
    points.take_cli_args(args)


def _model_loaded(result: Any, model_runner: Any, *args: Any, **kwargs: Any) -> None:
    points.model_loaded(model_runner)


def _new_batch(result: Any, cls: type, batch: Any, *args: Any, **kwargs: Any) -> None:
    points.new_batch(result, batch)


def _begin_pass(result: Any, model_runner: Any, forward_batch: Any) -> None:
    points.begin_pass(model_runner, forward_batch)


def _end_pass(result: Any, model_runner: Any, *args: Any, **kwargs: Any) -> None:
    points.end_pass(model_runner)


def _dispatch(dispatcher: Any, hidden_states: Any, topk_output: Any) -> tuple[Any, Any]:
    topk_output = points.before_dispatch(dispatcher, hidden_states, topk_output)
    return (dispatcher, hidden_states, topk_output), {}


def _experts(original: Callable[..., Any], layer: Any, dispatch_output: Any) -> Any:
    combine_input = points.run_experts(layer, dispatch_output)
    return original(layer, dispatch_output) if combine_input is None else combine_input


def _combine(dispatcher: Any, *args: Any, **kwargs: Any) -> None:
    points.after_experts(dispatcher)


def _combined(result: Any, dispatcher: Any) -> None:
    points.after_combine(dispatcher)


def _state(result: Any, *args: Any, **kwargs: Any) -> None:
    points.add_internal_state(result.internal_state)


def _set_state(controller: Any, recv_req: Any) -> None:
    points.take_internal_state(recv_req)


def _http(server_args: Any, tokenizer_manager: Any, *args: Any, **kwargs: Any) -> None:
    from sglang.srt.entrypoints.http_server import app

    points.serve_http(app, tokenizer_manager)


def _request(manager: Any, obj: Any, input_ids: Any) -> None:
    points.check_request(obj, input_ids)


HOOKS: dict[str, tuple[Kind, Callable[..., Any]]] = {
    "flags": ("AFTER", _flags),
    "parsed-flags": ("BEFORE", _parsed_flags),
    "model-loaded": ("AFTER", _model_loaded),
    "new-batch": ("AFTER", _new_batch),
    "begin-pass": ("AFTER", _begin_pass),
    "end-pass": ("AFTER", _end_pass),
    "dispatch": ("BEFORE", _dispatch),
    "experts": ("AROUND", _experts),
    "combine": ("BEFORE", _combine),
    "combined": ("AFTER", _combined),
    "state": ("AFTER", _state),
    "set-state": ("BEFORE", _set_state),
    "http": ("BEFORE", _http),
    "request": ("BEFORE", _request),
}
