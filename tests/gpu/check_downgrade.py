"""Streams, slots and numerics of the lever downgrade on one GPU; ends with an error if wrong.

    python tests/gpu/check_downgrade.py

No server: conversions race with reads of the slots on real streams, for a thousand layers in random
order, and every read must see its own layer; then the two GEMMs of some experts in float8, by
DeepGEMM on what our kernels made, against bfloat16; then a layer in emulated FP4 against the same
on the host. Under a minute on an H100.

Shape letters: E local experts, M rows, H hidden size, I expert size.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout

from benchmarks.gpu.one_layer import LayerSizes, received_rows
from benchmarks.gpu.one_layer import make_layer as make_small
from sglang_moelb.ep.low import fp8
from sglang_moelb.ep.low.flags import HostFlags
from sglang_moelb.ep.low.formats import EMULATED, format_named
from sglang_moelb.ep.low.lanes import lanes_of
from sglang_moelb.ep.low.staging import Staging
from sglang_moelb.kernels.quantise_rows import quantise_rows, silu_mul_quantise

NUM_EXPERTS, HIDDEN, INNER = 32, 2048, 768
NUM_LAYERS, NUM_PASSES, GROUP_ROWS = 6, 170, 256


def make_layer(seed: int) -> Any:
    """Weights of a layer as SGLang holds them."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return (0.02 * torch.randn(shape, generator=generator, device="cuda")).bfloat16()

    return SimpleNamespace(
        w13_weight=torch.nn.Parameter(draw(NUM_EXPERTS, 2 * INNER, HIDDEN), requires_grad=False),
        w2_weight=torch.nn.Parameter(draw(NUM_EXPERTS, HIDDEN, INNER), requires_grad=False),
    )


def sums_of(weights: fp8.Fp8Weights) -> torch.Tensor:
    """A number for each expert that any other layer's would not give, on the device."""
    bits = weights.w13.view(torch.uint8).view(NUM_EXPERTS, -1)
    return bits[:, ::61].sum(dim=1, dtype=torch.int64) + bits[:, -4096:].sum(dim=1)


def check_slots(layers: list[Any]) -> None:
    """Every run reads the weights of its own layer, whatever the streams do."""
    every_e = torch.ones(NUM_EXPERTS, dtype=torch.int32, device="cuda")
    expected = []
    for layer in layers:
        weights = fp8.allocate(layer)
        fp8.convert(layer, weights, every_e)
        expected.append(sums_of(weights))
    rng = random.Random(0)
    for num_slots in (1, 2):
        staging = Staging(
            layers, num_slots=num_slots, resident=(), lanes=lanes_of(torch.device("cuda"))
        )
        flags = HostFlags(NUM_EXPERTS, torch.device("cuda"))
        noise = torch.randn(2048, 2048, device="cuda")
        seen = []
        for _ in range(NUM_PASSES):
            for number in rng.sample(range(NUM_LAYERS), NUM_LAYERS):
                wanted_e = (torch.rand(NUM_EXPERTS, device="cuda") < 0.7).int()
                flags.send(wanted_e)
                staging.convert(number, wanted_e)
                for _ in range(rng.randrange(3)):
                    noise = (noise @ noise).sigmoid()
                weights = staging.ready(number)
                seen.append((number, wanted_e, sums_of(weights)))
                staging.done(number)
                told = flags.read()
                if told.tolist() != wanted_e.bool().tolist():
                    raise SystemExit("the flags on the host are not those of the plan")
        for number, wanted_e, sums_e in seen:
            wrong_e = (sums_e != expected[number]) & (wanted_e != 0)
            if wrong_e.any():
                raise SystemExit(f"{num_slots} slots: layer {number} read another one's weights")
        print(f"{num_slots} slots: {len(seen)} layers read their own weights")


def check_numerics(layer: Any) -> None:
    """Two GEMMs and the activation between them, every expert with some rows."""
    import deep_gemm

    weights = fp8.allocate(layer)
    fp8.convert(layer, weights, torch.ones(NUM_EXPERTS, dtype=torch.int32, device="cuda"))
    num_rows = NUM_EXPERTS * GROUP_ROWS
    x = torch.randn(num_rows, HIDDEN, device="cuda").bfloat16()
    group = torch.arange(NUM_EXPERTS, device="cuda", dtype=torch.int32)
    group = group.repeat_interleave(GROUP_ROWS)
    gate_up = torch.empty(num_rows, 2 * INNER, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(num_rows, HIDDEN, device="cuda", dtype=torch.bfloat16)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
        quantise_rows(x, column_major=True), (weights.w13, weights.w13_scale), gate_up, group
    )
    act = silu_mul_quantise(gate_up, column_major=True)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(act, (weights.w2, weights.w2_scale), out, group)
    by_expert = x.view(NUM_EXPERTS, GROUP_ROWS, HIDDEN).float()
    gate, up = torch.bmm(by_expert, layer.w13_weight.float().mT).chunk(2, dim=-1)
    exact = torch.bmm(torch.nn.functional.silu(gate) * up, layer.w2_weight.float().mT)
    error = float((out.view_as(exact).float() - exact).norm() / exact.norm())
    print(f"float8 against float32, relative error of the experts' outputs: {error:.4f}")
    if not 0.0 < error < 0.08:
        raise SystemExit("the float8 experts are not close to the exact ones")


def check_emulated_fp4() -> None:
    """Host and device give the same outputs but for sums of another order and what they round."""
    sizes = LayerSizes(num_experts=8, hidden=512, inner=256, topk=4)
    rows_e = [0, 1, 127, 128, 129, 300, 17, 64]
    outputs: dict[str, dict[str, torch.Tensor]] = {name: {} for name in EMULATED}
    layer = make_small(0, sizes, torch.device("cuda"))
    rows = received_rows(0, rows_e, 2, sizes, torch.device("cuda"))
    for device in ("cuda", "cpu"):
        there = SimpleNamespace(
            w13_weight=layer.w13_weight.to(device), w2_weight=layer.w2_weight.to(device)
        )
        rows_there = rows._replace(
            hidden_states=rows.hidden_states.to(device),
            topk_ids=rows.topk_ids.to(device),
            topk_weights=rows.topk_weights.to(device),
        )
        for name in EMULATED:
            low_format = format_named(name, [there])
            weights = low_format.allocate(there)
            every_e = torch.ones(sizes.num_experts, dtype=torch.int32, device=device)
            low_format.convert(there, weights, every_e)
            out = low_format.run(there, low_format.quantised(rows_there), weights)
            outputs[name][device] = out.hidden_states.float().cpu()
    for name, out in outputs.items():
        error = float((out["cuda"] - out["cpu"]).norm() / out["cpu"].norm())
        print(f"{name}: device against host, relative difference {error:.5f}")
        if not error < 0.01 or not out["cpu"].any():
            raise SystemExit(f"{name} on the device is not what it is on the host")


def main() -> None:
    """Run the checks."""
    torch.manual_seed(0)
    layers = [make_layer(seed) for seed in range(NUM_LAYERS)]
    check_slots(layers)
    check_numerics(layers[0])
    check_emulated_fp4()
    print("ok")


if __name__ == "__main__":
    main()
