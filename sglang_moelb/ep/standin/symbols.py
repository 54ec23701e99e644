"""What the stand-in touches of SGLang 0.5.23: each name, what it must look like, and why."""

from __future__ import annotations

from dataclasses import dataclass

_MOE = "sglang.srt.layers.moe"
_DEEPSEEK = "sglang.srt.models.deepseek_common"
_DISPATCHER = f"{_MOE}.token_dispatcher.deepep"
GET_BUFFER = f"{_DISPATCHER}.DeepEPBuffer.get_deepep_buffer"
APPLY = "sglang.srt.layers.quantization.unquant.UnquantizedFusedMoEMethod.apply"
FORWARD_NATIVE = f"{_MOE}.fused_moe_native.moe_forward_native"
KV_CLASS = "sglang.srt.disaggregation.utils.get_kv_class"
DEEP_GEMM = "sglang.srt.layers.deep_gemm_wrapper"
ON_IDLE = "sglang.srt.managers.scheduler.Scheduler.on_idle"
DP_RECEIVE = "sglang.srt.managers.data_parallel_controller.sock_recv"
SET_ENVIRONMENT = "sglang.srt.entrypoints.engine._set_envs_and_config"
ATTENTION = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"


@dataclass(frozen=True, slots=True, kw_only=True)
class Symbol:
    """A touched name of SGLang, its parameters (None: not called), and why it is touched."""

    path: str
    parameters: tuple[str, ...] | None
    why: str


SYMBOLS = (
    Symbol(
        path=GET_BUFFER,
        parameters=(
            "group",
            "hidden_size",
            "param_bytes",
            "deepep_mode",
            "num_max_dispatch_tokens_per_rank",
            "num_experts",
        ),
        why="asks a CUDA device for its number of SMs",
    ),
    Symbol(
        path=f"{_DISPATCHER}.DeepEPNormalDispatchOutput",
        parameters=(
            "hidden_states",
            "hidden_states_scale",
            "topk_ids",
            "topk_weights",
            "num_recv_tokens_per_expert",
        ),
        why="read by the reference experts",
    ),
    Symbol(
        path=f"{_DISPATCHER}.DeepEPLLDispatchOutput",
        parameters=(
            "hidden_states",
            "hidden_states_scale",
            "topk_ids",
            "topk_weights",
            "masked_m",
            "expected_m",
        ),
        why="read by the reference experts",
    ),
    Symbol(
        path=f"{_DISPATCHER}.DeepEPLLCombineInput",
        parameters=("hidden_states", "topk_ids", "topk_weights"),
        why="made by the reference experts",
    ),
    Symbol(
        path=f"{_DISPATCHER}.DeepEPNormalCombineInput",
        parameters=("hidden_states", "topk_ids", "topk_weights"),
        why="made by the reference experts",
    ),
    Symbol(
        path=f"{DEEP_GEMM}.ENABLE_JIT_DEEPGEMM",
        parameters=None,
        why="the dispatcher and DeepEPMoE demand it",
    ),
    Symbol(
        path=f"{DEEP_GEMM}.update_deep_gemm_config",
        parameters=("gpu_id",),
        why="calls into DeepGEMM, which is not there",
    ),
    Symbol(
        path=f"{_MOE}.moe_runner.runner.register_moe_runner_core",
        parameters=("backend_name", "factory"),
        why="the extension point for the reference experts",
    ),
    Symbol(
        path=f"{_MOE}.moe_runner.base.DispatchMoeRunnerCore.run_from_dispatch",
        parameters=("self", "dispatch_output", "quant_info", "runner_config", "hooks"),
        why="implemented by the reference experts",
    ),
    Symbol(
        path=APPLY,
        parameters=("self", "layer", "dispatch_output"),
        why="on a CPU it takes the standard dispatch format only",
    ),
    Symbol(
        path=f"{APPLY.rpartition('.')[0]}.forward_cuda",
        parameters=("self", "layer", "dispatch_output"),
        why="calls the runner with a DeepEP dispatch output",
    ),
    Symbol(
        path=FORWARD_NATIVE,
        parameters=("layer", "x", "topk_output", "moe_runner_config"),
        why="fails on the id -1 of experts of other ranks (a2a none)",
    ),
    Symbol(path=ATTENTION, parameters=None, why="lacks get_cpu_graph_seq_len_fill_value"),
    Symbol(
        path=f"{_DEEPSEEK}.attention_backend_handler.AttentionBackendRegistry.register",
        parameters=("backend_name", "handler_func"),
        why="sends latent attention over torch_native to a form that fails on its cache",
    ),
    Symbol(
        path=f"{_DEEPSEEK}.attention_forward_methods.forward_methods.AttnForwardMethod.MLA",
        parameters=None,
        why="the only form of latent attention that works with torch_native",
    ),
    Symbol(
        path=KV_CLASS,
        parameters=("transfer_backend", "class_type"),
        why="Mooncake's sender makes the prefill role pin memory and record CUDA events",
    ),
    Symbol(path=ON_IDLE, parameters=("self",), why="an idle rank keeps its core busy"),
    Symbol(
        path=DP_RECEIVE,
        parameters=("socket", "flags"),
        why="the data-parallel controller keeps a core busy",
    ),
    Symbol(
        path=SET_ENVIRONMENT,
        parameters=("server_args",),
        why="four processes would each import SGLang for 8 s, beside the first",
    ),
    Symbol(
        path="sglang.srt.plugins.hook_registry.HookRegistry.register",
        parameters=("target", "hook", "hook_type", "source"),
        why="installs the hooks",
    ),
)
