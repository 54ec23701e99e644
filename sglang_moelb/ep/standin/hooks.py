"""The SGLang plugin `moelb_standin`: lifts what keeps the DeepEP path from running without a GPU.

`register` is its entry point. It runs in every process of a server and does nothing unless
`sglang_moelb.environment.standin_requested()`. SGLang's plugin loader logs and swallows every
exception but `SystemExit`, therefore each touched symbol is resolved and compared with `SYMBOLS`
before anything is installed, and a mismatch ends the process with what was expected and found.
"""

from __future__ import annotations

import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from sglang_moelb.environment import standin_requested
from sglang_moelb.ep.standin.symbols import (
    APPLY,
    DP_RECEIVE,
    FORWARD_NATIVE,
    GET_BUFFER,
    KV_CLASS,
    ON_IDLE,
    SET_ENVIRONMENT,
    SYMBOLS,
    Symbol,
)

SITE = Path(__file__).resolve().parent / "site"
SHADOWED = ("deep_ep", "sgl_kernel")


def register() -> None:
    """Entry point: install the stand-in's hooks, or leave the process untouched, or end it."""
    if not standin_requested() or _in_detokenizer():
        return
    # SGLang's modules cannot even be imported unless the shadowing ones are found first.
    problems = find_shadow_problems() or find_symbol_problems(SYMBOLS)
    if problems:
        raise SystemExit("moelb stand-in cannot be installed:\n  " + "\n  ".join(problems))
    _install()


def _in_detokenizer() -> bool:
    """Whether this is the one process of a server that has nothing of the stand-in's to change.

    Looking at `SYMBOLS` would import the scheduler there, by which others tell the process.
    """
    managers = "sglang.srt.managers"
    loaded = sys.modules
    return f"{managers}.detokenizer_manager" in loaded and f"{managers}.scheduler" not in loaded


def find_shadow_problems() -> list[str]:
    """One line for each module of `site/` that Python would import from elsewhere."""
    problems = []
    for name in SHADOWED:
        spec = importlib.util.find_spec(name)
        found = spec.origin if spec is not None else None
        if found is None or SITE not in Path(found).resolve().parents:
            problems.append(
                f"module {name}: expected in {SITE}, found {found}; put it first on "
                "PYTHONPATH, or start with python -m sglang_moelb.ep.standin.launch"
            )
    return problems


def find_symbol_problems(symbols: tuple[Symbol, ...]) -> list[str]:
    """One line, with expected and found, for each symbol that is missing or has changed."""
    problems = []
    for symbol in symbols:
        expected = "exists" if symbol.parameters is None else f"({', '.join(symbol.parameters)})"
        try:
            target = pkgutil.resolve_name(symbol.path)
        except (ImportError, AttributeError) as error:
            problems.append(f"{symbol.path} [{symbol.why}]: expected {expected}, found {error!r}")
            continue
        if symbol.parameters is None:
            continue
        found = tuple(inspect.signature(target).parameters)
        if found != symbol.parameters:
            problems.append(
                f"{symbol.path} [{symbol.why}]: expected {expected}, found ({', '.join(found)})"
            )
    return problems


def _install() -> None:
    from sglang.srt.layers import deep_gemm_wrapper
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang.srt.layers.moe.moe_runner.runner import register_moe_runner_core
    from sglang.srt.models.deepseek_common.attention_backend_handler import (
        AttentionBackendRegistry,
    )
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import (
        AttnForwardMethod,
    )
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sglang_moelb.ep.standin.forks import fork_processes
    from sglang_moelb.ep.standin.idle import wait_for_request, wait_for_work
    from sglang_moelb.ep.standin.runner_core import ReferenceRunnerCore, moe_forward_native

    deep_gemm_wrapper.ENABLE_JIT_DEEPGEMM = True
    deep_gemm_wrapper.update_deep_gemm_config = _update_deep_gemm_config
    if not hasattr(TorchNativeAttnBackend, "get_cpu_graph_seq_len_fill_value"):
        TorchNativeAttnBackend.get_cpu_graph_seq_len_fill_value = _seq_len_fill_value
    if not hasattr(torch.cpu, "empty_cache"):
        torch.cpu.empty_cache = _empty_cache  # type: ignore[attr-defined]
    if not hasattr(torch.cpu, "is_current_stream_capturing"):
        capturing = _is_current_stream_capturing
        torch.cpu.is_current_stream_capturing = capturing  # type: ignore[attr-defined]
    AttentionBackendRegistry.register(
        "torch_native", lambda attention, forward_batch: AttnForwardMethod.MLA
    )
    register_moe_runner_core("deep_gemm", ReferenceRunnerCore)
    HookRegistry.register(GET_BUFFER, _get_deepep_buffer, HookType.AROUND)
    HookRegistry.register(APPLY, _apply, HookType.AROUND)
    HookRegistry.register(FORWARD_NATIVE, moe_forward_native, HookType.REPLACE)
    HookRegistry.register(ON_IDLE, wait_for_work, HookType.AFTER)
    HookRegistry.register(DP_RECEIVE, wait_for_request, HookType.AROUND)
    HookRegistry.register(SET_ENVIRONMENT, fork_processes, HookType.AFTER)
    HookRegistry.register(KV_CLASS, _without_pinned_indices, HookType.AFTER)


def _get_deepep_buffer(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _device_with_sms():
        return original(*args, **kwargs)


@contextmanager
def _device_with_sms() -> Iterator[None]:
    """While open, the CUDA device that is not there has twice the SMs that DeepEP uses."""
    original = torch.cuda.get_device_properties
    properties: Any = SimpleNamespace(multi_processor_count=40)
    torch.cuda.get_device_properties = lambda device=None: properties
    try:
        yield
    finally:
        torch.cuda.get_device_properties = original


def _apply(original: Callable[..., Any], method: Any, layer: Any, dispatch_output: Any) -> Any:
    """`forward_cuda` hands a DeepEP dispatch output to the runner; nothing in it is CUDA."""
    if dispatch_output.format.is_deepep_normal() or dispatch_output.format.is_deepep_ll():
        return method.forward_cuda(layer, dispatch_output)
    return original(method, layer, dispatch_output)


def _without_pinned_indices(kv_class: Any, *args: Any, **kwargs: Any) -> None:
    """SGLang asks the sender's class whether page indices may come through pinned memory."""
    if getattr(kv_class, "supports_host_tensor_indices", False):
        kv_class.supports_host_tensor_indices = False


def _update_deep_gemm_config(gpu_id: int) -> None:
    """There is no DeepGEMM to configure."""


def _seq_len_fill_value(backend: Any) -> int:
    """Length of a padding request: one token, as the other backends have it."""
    return 1


def _empty_cache() -> None:
    """The host has no caching allocator to empty."""


def _is_current_stream_capturing() -> bool:
    """The host captures no graph."""
    return False
