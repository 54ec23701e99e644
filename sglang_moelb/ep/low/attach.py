"""Start of the lever downgrade: whether this server can have it, its memory, and its warm-up.

Runs when the model has been loaded, before SGLang sizes its KV cache.

Shape letters: N rows, K top-k.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from sglang_moelb.config import Config
from sglang_moelb.ep.low import fp8
from sglang_moelb.ep.low.flags import HostFlags
from sglang_moelb.ep.low.formats import EMULATED, caution, format_named, format_refusal
from sglang_moelb.ep.low.lanes import lanes_of
from sglang_moelb.ep.low.lever import DowngradeLever
from sglang_moelb.ep.low.staging import Staging
from sglang_moelb.ep.memory import MemoryLedger, kv_token_bytes_of
from sglang_moelb.ep.unfit import (
    adapters_refusal,
    dispatch_refusal,
    offload_refusal,
    quantised_refusal,
    runner_refusal,
)
from sglang_moelb.ep.weight_updates import refuse_updates
from sglang_moelb.hot_config import wants_slots, without_slots

logger = logging.getLogger("sglang_moelb")


def attach_downgrade(
    model_runner: Any, config: Config, rank: int, group: Any
) -> tuple[Config, DowngradeLever | None, MemoryLedger]:
    """The configuration in force, the lever or None, and the memory held, of this rank.

    Mode downgrade ends the process where it is not possible; another mode with `downgrade.ready`
    goes on without it and says why.
    Every rank of the EP `group` must come here with the same configuration.
    """
    if not wants_slots(config) or not config.downgrade.slots:
        if config.mode == "downgrade":
            _refuse("downgrade.slots 0", "there is no room to convert weights into; use 1 or 2")
        return without_slots(config), None, MemoryLedger()
    layers = expert_layers(model_runner.model)
    refusal = refusal_of(config.downgrade.format, layers)
    if refusal:
        if config.mode == "downgrade":
            _refuse(*refusal)
        logger.warning(
            "sglang_moelb: mode %s goes without downgrade: %s: %s. Set downgrade.ready to false to "
            "leave it out without this line.",
            config.mode,
            *refusal,
        )
        return without_slots(config), None, MemoryLedger()
    resident = layers_named(config.downgrade.resident_layers, len(layers))
    device = layers[0].w13_weight.device
    staging = Staging(
        layers,
        num_slots=config.downgrade.slots,
        resident=resident,
        lanes=lanes_of(device),
        low_format=format_named(config.downgrade.format, layers),
    )
    _refuse_updates(config, layers[0])
    if told := caution(staging.low_format.NAME, device):
        logger.warning("sglang_moelb: %s", told)
    if device.type == "cuda":
        warm_up(layers[0], staging, group)
    ledger = _ledger(model_runner, staging)
    flags = HostFlags(len(layers[0].w13_weight), device)
    return config, DowngradeLever(layers, rank, staging, flags), ledger


def _refuse_updates(config: Config, layer: Any) -> None:
    """Keep the weights as they are where something made of them is kept."""
    name = config.downgrade.format
    if config.downgrade.resident_layers:
        what = f"downgrade.resident_layers {config.downgrade.resident_layers!r}"
        refuse_updates(layer, what, "its copies are of the weights at start")
    elif name in EMULATED and EMULATED[name][0].has_global:
        refuse_updates(layer, f"downgrade.format {name}", "its global scales are of those at start")


def expert_layers(model: torch.nn.Module) -> list[Any]:
    """SGLang's MoE layers, in the order of a forward pass."""
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    return [module for module in model.modules() if isinstance(module, FusedMoE)]


def layers_named(text: str, num_layers: int) -> frozenset[int]:
    """The layers of `downgrade.resident_layers`; ends the process for one that is not there."""
    if text == "all":
        return frozenset(range(num_layers))
    named: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        named |= set(range(int(first), int(last or first) + 1))
    if named and max(named) >= num_layers:
        _refuse(
            f"downgrade.resident_layers {text!r}",
            f"the model has the MoE layers 0 to {num_layers - 1}",
        )
    return frozenset(named)


def refusal_of(
    name: str, layers: Sequence[Any], *, prefills_only: bool = True
) -> tuple[str, str] | None:
    """What keeps this server from running experts at two precisions, and why; None if nothing does.

    `name`: the lower, as `downgrade.format` has it. `prefills_only`: see `experts_refusal`.
    """
    layer = layers[0]
    emulates = f"downgrade.format {name}"
    return (
        experts_refusal(layers, prefills_only=prefills_only)
        or (activation_refusal(emulates, layer, "use auto") if name in EMULATED else None)
        or format_refusal(name, layer.w13_weight)
    )


def experts_refusal(layers: Sequence[Any], *, prefills_only: bool) -> tuple[str, str] | None:
    """What keeps `layers` from running at two precisions, whatever the lower is; None if nothing.

    `prefills_only`: as levers do; resident copies act in decode too.
    """
    layer = layers[0]
    refusal = (
        quantised_refusal(
            layers,
            "a quantised checkpoint has no lower precision to go to: on Hopper fp8 is the lowest "
            "that computes",
        )
        or adapters_refusal("adapters are added at one precision")
        or runner_refusal(layer, "only deep_gemm takes another precision with each call")
    )
    if refusal:
        return refusal
    shapes = {(*one.w13_weight.shape, *one.w2_weight.shape[1:]) for one in layers}
    if len(shapes) != 1 or any(size % fp8.BLOCK for size in next(iter(shapes))[1:]):
        return (
            f"experts of shapes {sorted(shapes)}",
            f"they must be equal in all layers, and hidden and expert size multiples of "
            f"{fp8.BLOCK}, as fp8's blocks and the tiles of 4-bit kernels are",
        )
    return offload_refusal() or dispatch_refusal(layer, prefills_only=prefills_only)


def activation_refusal(what: str, layer: Any, fix: str) -> tuple[str, str] | None:
    """What is not `silu(gate) * up`, all that `what` computes, by SGLang's `MoeRunnerConfig`."""
    config = layer.quant_method.runner.config
    unlike = {
        "activation": config.activation if config.activation != "silu" else None,
        "is_gated": None if config.is_gated else False,
        "swiglu_limit": config.swiglu_limit,
        "gemm1_alpha": config.gemm1_alpha,
        "apply_router_weight_on_input": config.apply_router_weight_on_input or None,
        "no_combine": config.no_combine or None,
    }
    found = {key: value for key, value in unlike.items() if value is not None}
    if found:
        return (
            f"experts with {found}",
            f"{what} can only compute silu(gate) * up; {fix}",
        )
    return None


def warm_up(layer: Any, staging: Staging, group: Any) -> None:
    """Compile what both precisions need, on all ranks, before requests come.

    The first downgrade would else stall the other ranks into DeepEP's timeout. Two runs of 128 rows
    of one expert, through SGLang's runner; DeepGEMM compiles all sizes on the first rank of a host
    and the others wait at the end. The low run reads a slot of zeros, or layer 0's kept copy.
    """
    dispatch_output = some_rows(layer)
    layer.quant_method.apply(layer=layer, dispatch_output=dispatch_output)
    wanted_e = torch.zeros(len(layer.w13_weight), dtype=torch.int32, device="cuda")
    staging.convert(0, wanted_e)
    low_format = staging.low_format
    low_format.run(layer, low_format.quantised(some_rows(layer)), staging.ready(0))
    staging.done(0)
    torch.cuda.synchronize()
    dist.barrier(group=group.cpu_group)


def some_rows(layer: Any, num_experts: int | None = None) -> Any:
    """128 rows of zeros for the first of `num_experts`, by default of the layer's, as received."""
    from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPNormalDispatchOutput

    weight = layer.w13_weight
    num_experts, hidden_size = num_experts or len(weight), weight.shape[2]
    ids_NK = torch.full((fp8.BLOCK, layer.top_k), -1, dtype=torch.int64, device=weight.device)
    ids_NK[:, 0] = 0
    return DeepEPNormalDispatchOutput(
        hidden_states=torch.zeros(
            fp8.BLOCK, hidden_size, dtype=weight.dtype, device=weight.device
        ),
        hidden_states_scale=None,
        topk_ids=ids_NK,
        topk_weights=torch.ones(ids_NK.shape, dtype=torch.float32, device=weight.device),
        num_recv_tokens_per_expert=[fp8.BLOCK] + [0] * (num_experts - 1),
    )


def _ledger(model_runner: Any, staging: Staging) -> MemoryLedger:
    return MemoryLedger(
        staging_bytes=staging.staging_bytes,
        resident_bytes=staging.resident_bytes,
        kv_token_bytes=kv_token_bytes_of(model_runner),
    )


def _refuse(what: str, why: str) -> None:
    sys.exit(
        f"sglang_moelb: {what} cannot be downgraded: {why}. Or start in another --moelb-mode."
    )
