"""On 2 or more GPUs: a layer of resident copies in decode, in a CUDA graph; ends with an error.

    torchrun --standalone --nproc-per-node 2 tests/gpu/check_resident_decode.py [--format mxfp4]

No server. DeepEP's low-latency dispatch and combine and DeepGEMM's masked GEMMs through SGLang's
runner, on a layer of 128 experts stored by a made-up placement: ids mapped to copies, experts of
two precisions, outputs combined. One graph is replayed on other inputs and other maps. Each token
of each replay and of the eager layer must be the plain sum of its logical experts in float32 within
what float8 rounds; with mxfp4 the sum of the decoded weights of the copies that it was sent to,
within what bfloat16 rounds. Replays must also equal the eager layer bit for bit, with mxfp4 where
an expert cannot have more rows than a block of Marlin: DeepEP lays rows as they arrive, and in
which block a row falls decides the order of its sums. Then the graph is timed beside one of the
layer as it was, in bfloat16. Under a minute, without the first compiling of Marlin. `--device cpu`
runs the same without a graph over the stand-in for DeepEP:

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 tests/gpu/check_resident_decode.py \
        --device cpu

Shape letters: T tokens of a rank, K top-k, P places of a rank, M rows that DeepEP has room for in
each, H hidden size, E experts.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

os.environ["SGLANG_JIT_DEEPGEMM_PRECOMPILE"] = "0"  # else minutes of compiling
os.environ["SGLANG_DEEPEP_BF16_DISPATCH"] = "1"
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]  # runs from a checkout, nothing installed

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from graphs import captured  # noqa: E402

from benchmarks.gpu.one_layer import LayerSizes, RunnerMethod, make_runner  # noqa: E402
from benchmarks.gpu.shared_gpus import local_device  # noqa: E402
from sglang_moelb.ep.expert_rows import WEIGHTS  # noqa: E402
from sglang_moelb.ep.resident.experts import ResidentExperts  # noqa: E402
from sglang_moelb.ep.resident.formats import FORMATS  # noqa: E402
from sglang_moelb.ep.resident.weights import store  # noqa: E402
from sglang_moelb.kernels.block_format import BlockFormat, fake_quantise_fp4  # noqa: E402
from sglang_moelb.kernels.lay_blocks.ref import BLOCKS  # noqa: E402
from sglang_moelb.placement import LayerLayout, LayerPlacement, Replica, layout  # noqa: E402
from sglang_moelb.types import Topology  # noqa: E402

MAX_TOKENS, NUM_SLOTS, NUM_COLD = 128, 4, 5
# Of a token, relative: float8 rounds four times by 3 % in the mean; a wrong expert of 8 is 0.5.
LOW_BOUND, HIGH_BOUND = 0.15, 0.02  # the second of bfloat16, four times by 0.2 %
REPLAYS, TIMES = 3, 30


class TopK(NamedTuple):
    """Of SGLang's top-k output what is read and replaced."""

    topk_ids: torch.Tensor


class Inputs:
    """What a graph reads: `fill` writes other values to the same places."""

    def __init__(self, num_tokens: int, sizes: argparse.Namespace) -> None:
        shape = (num_tokens, sizes.topk)
        self.x_TH = torch.zeros(num_tokens, sizes.hidden, dtype=torch.bfloat16, device=sizes.device)
        self.ids_TK = torch.zeros(shape, dtype=torch.int64, device=sizes.device)
        self.weights_TK = torch.zeros(shape, device=sizes.device)

    def fill(self, ids_TK: torch.Tensor, seed: int) -> None:
        """Other rows and weights for these ids."""
        drawn = torch.Generator().manual_seed(seed)
        self.x_TH.copy_(torch.randn(self.x_TH.shape, generator=drawn))
        self.ids_TK.copy_(ids_TK)
        self.weights_TK.copy_(0.5 + 0.5 * torch.rand(self.weights_TK.shape, generator=drawn))


def made_up(sizes: argparse.Namespace) -> LayerPlacement:
    """Replicas of every rank's first experts on the next rank; its last ones low."""
    own = sizes.experts // sizes.ranks
    return LayerPlacement(
        replicas=tuple(
            Replica(expert=rank * own + slot, rank=(rank + 1) % sizes.ranks)
            for rank in range(sizes.ranks)
            for slot in range(NUM_SLOTS)
        ),
        low_experts=tuple(
            (rank + 1) * own - 1 - at for rank in range(sizes.ranks) for at in range(NUM_COLD)
        ),
    )


def make_layer(rank: int, sizes: argparse.Namespace) -> Any:
    """A rank's experts as SGLang loads them; any rank can draw any other's."""
    layer = torch.nn.Module()
    drawn = torch.Generator(sizes.device).manual_seed(rank)
    shapes = ((2 * sizes.inner, sizes.hidden), (sizes.hidden, sizes.inner))
    for name, shape in zip(WEIGHTS, shapes, strict=True):
        size = (sizes.experts // sizes.ranks, *shape)
        weight = torch.randn(size, generator=drawn, device=sizes.device) / shape[1] ** 0.5
        layer.register_parameter(name, torch.nn.Parameter(weight.bfloat16(), requires_grad=False))
    small = LayerSizes(
        num_experts=sizes.experts // sizes.ranks,
        hidden=sizes.hidden,
        inner=sizes.inner,
        topk=sizes.topk,
    )
    layer.quant_method = RunnerMethod(make_runner(small, sizes.device))
    return layer


def make_buffer(group: dist.ProcessGroup, sizes: argparse.Namespace, num_places: int) -> Any:
    """DeepEP's buffer for the physical experts, as SGLang makes it."""
    if sizes.device == "cpu":
        from sglang_moelb.ep.standin.deep_ep_low_latency import LowLatencyBuffer

        return LowLatencyBuffer(group, low_latency_mode=True)
    from deep_ep import Buffer

    num_bytes = Buffer.get_low_latency_rdma_size_hint(
        MAX_TOKENS, sizes.hidden, sizes.ranks, sizes.ranks * num_places
    )
    return Buffer(group, 0, num_bytes, low_latency_mode=True, num_qps_per_rank=num_places)


def decode(
    buffer: Any,
    num_experts: int,
    inputs: Inputs,
    physical: Callable[[TopK], TopK],
    run: Callable[[Any], Any],
) -> torch.Tensor:
    """One MoE layer of decode, as SGLang's dispatcher and layer call it."""
    from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPLLDispatchOutput

    ids_TK = physical(TopK(inputs.ids_TK)).topk_ids
    rows_PMH, num_rows_P, handle, _, arrived = buffer.low_latency_dispatch(
        inputs.x_TH,
        ids_TK,
        MAX_TOKENS,
        num_experts,
        use_fp8=False,
        async_finish=False,
        return_recv_hook=True,
    )
    arrived()
    expected_m = (ids_TK.numel() * buffer.group_size + num_experts) // num_experts
    done = run(
        DeepEPLLDispatchOutput(rows_PMH, None, ids_TK, inputs.weights_TK, num_rows_P, expected_m)
    )
    out_TH, _, arrived = buffer.low_latency_combine(
        done.hidden_states,
        ids_TK,
        inputs.weights_TK,
        handle,
        async_finish=False,
        return_recv_hook=True,
    )
    arrived()
    return out_TH


def routings(
    sizes: argparse.Namespace, num_tokens: int, rank: int
) -> dict[str, tuple[torch.Tensor, float]]:
    """Ids of this rank's tokens, and how far a token may be from the exact sum."""
    drawn = torch.Generator().manual_seed(100 + rank)
    own, every = sizes.experts // sizes.ranks, torch.arange(sizes.experts)
    low = torch.tensor(made_up(sizes).low_experts)
    low_bound = LOW_BOUND if sizes.format == "fp8" else HIGH_BOUND
    replicated = every[every % own < NUM_SLOTS]
    high = every[(every % own >= NUM_SLOTS) & (every % own < own - NUM_COLD)]

    def of(experts: torch.Tensor, topk: int = sizes.topk) -> torch.Tensor:
        chosen = torch.rand(num_tokens, len(experts), generator=drawn).topk(topk, dim=1).indices
        return torch.cat([experts[chosen], chosen.new_full((num_tokens, sizes.topk - topk), -1)], 1)

    padded = of(every)
    padded[num_tokens // 2 :] = -1
    padded[::3, 1] = -1
    one = of(every[:1], 1)
    idle = torch.full_like(one, -1) if rank == 0 else of(every)
    return {
        "random": (of(every), low_bound),
        "replicated": (of(replicated), low_bound),
        "low only": (of(low), low_bound),
        "high only": (of(high), HIGH_BOUND),
        "one expert": (one, low_bound),
        "padded": (padded, low_bound),
        "rank 0 idle": (idle, low_bound),
    }


def exact(inputs: Inputs, state: Any) -> torch.Tensor:
    """The plain sum of each token's logical experts, in float32, `[T, H]`.

    Of decoded weights where the copy is low in mxfp4; float8's rows would have to be rounded too.
    """
    out_TH = torch.zeros(inputs.x_TH.shape, device=inputs.x_TH.device)
    layers, own = state.layers, len(state.layers[0].w13_weight)
    place_TK = state.resident.physical(0, TopK(inputs.ids_TK)).topk_ids % state.place.num_places
    is_low_TK = (place_TK >= len(state.place.high[0])) & (state.low_format.NAME == "mxfp4")
    for expert, is_low in itertools.product(range(own * len(layers)), (False, True)):
        chosen_TK = (inputs.ids_TK == expert) & (is_low_TK == is_low)
        token, column = chosen_TK.nonzero(as_tuple=True)
        if not len(token):
            continue
        w13, w2 = (
            _values(getattr(layers[expert // own], name)[expert % own], is_low) for name in WEIGHTS
        )
        gate, up = (inputs.x_TH[token].float() @ w13.T).chunk(2, dim=1)
        rows = (torch.nn.functional.silu(gate) * up) @ w2.T
        out_TH.index_add_(0, token, rows * inputs.weights_TK[token, column, None])
    return out_TH


def _values(weight: torch.Tensor, is_low: bool) -> torch.Tensor:
    """float32, as mxfp4 decodes them if `is_low`."""
    if is_low:
        weight = fake_quantise_fp4(weight[None], BlockFormat.MXFP4_CEIL)[0]
    return weight.float()


def meet() -> None:
    """Wait for the device and for all ranks."""
    torch.cuda.synchronize()
    dist.barrier()


def check(
    what: str,
    step: Any,
    replay: Any,
    inputs: Inputs,
    truth: torch.Tensor,
    bound: float,
    same_bits: bool,
) -> float:
    """Replayed, eager and exact against each other; the worst token's relative error."""
    outputs = [step().clone(), *(replay().clone() for _ in range(REPLAYS))]
    if same_bits and not all(torch.equal(out, outputs[0]) for out in outputs):
        raise SystemExit(f"{what}: the graph's output is not the eager one")
    size_T, worst = truth.norm(dim=1), 0.0
    for out_TH in outputs:
        apart_T = (out_TH.float() - truth).norm(dim=1)
        worst = max(worst, float((apart_T / size_T.clamp(min=1e-6)).max()))
        if bool((apart_T > bound * size_T).any()) or not bool(out_TH.isfinite().all()):
            raise SystemExit(
                f"{what}: token {int((apart_T - bound * size_T).argmax())} is {worst:.3f} from "
                "its logical experts"
            )
    return worst


def remap(resident: ResidentExperts, place: LayerLayout, kind: str) -> None:
    """Write other maps to the same places."""
    copies_EC = torch.tensor(place.copies_EC, dtype=torch.int32)
    num_copies_E = torch.tensor(place.num_copies_E, dtype=torch.int32)
    if kind == "originals only":
        num_copies_E.fill_(1)
    elif kind == "replicas only":
        copies_EC[:, 0] = copies_EC.gather(1, num_copies_E[:, None].long() - 1)[:, 0]
        num_copies_E.fill_(1)
    resident._copies_L[0].copy_(copies_EC)
    resident._num_copies_L[0].copy_(num_copies_E)


def median_us(replay: Callable[[], Any]) -> tuple[float, float, float]:
    """Median, least and most time of a replay, in microseconds."""
    times_us = []
    for _ in range(TIMES):
        dist.barrier()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay()
        end.record()
        end.synchronize()
        times_us.append(1000 * begin.elapsed_time(end))
    times_us = times_us[5:]
    return statistics.median(times_us), min(times_us), max(times_us)


def check_layer(sizes: argparse.Namespace, rank: int, num_tokens: int, state: Any) -> None:
    """All routings and maps at one batch size, in one graph."""
    inputs = Inputs(num_tokens, sizes)
    inputs.fill(routings(sizes, num_tokens, rank)["random"][0], 0)
    replay = captured(step := state.step_of(inputs), sizes.device, meet)
    worst, same_bits = {}, has_same_bits(sizes, num_tokens)
    for maps in ("all copies", "originals only", "replicas only"):
        remap(state.resident, state.place, maps)
        for seed, (name, (ids_TK, bound)) in enumerate(
            routings(sizes, num_tokens, rank).items()
        ):
            inputs.fill(ids_TK, 10 * seed + rank)
            truth = exact(inputs, state)
            what = f"rank {rank}, {num_tokens} tokens, {maps}, {name}"
            worst[name] = max(
                check(what, step, replay, inputs, truth, bound, same_bits),
                worst.get(name, 0.0),
            )
    remap(state.resident, state.place, "all copies")
    shown = ", ".join(f"{name} {error:.3f}" for name, error in worst.items())
    how = "equals eager bit for bit" if same_bits else "is as near as eager"
    print(f"rank {rank}, {num_tokens} tokens: graph {how}; worst token's error: {shown}")


def has_same_bits(sizes: argparse.Namespace, num_tokens: int) -> bool:
    """Whether the order in which DeepEP lays rows cannot change a sum."""
    return sizes.format != "mxfp4" or num_tokens * sizes.ranks <= BLOCKS[0]


def compare_times(sizes: argparse.Namespace, rank: int, buffer: Any, state: Any) -> None:
    """A graph of the resident layer beside one of the layer in bfloat16, on the same ids."""
    stock = make_layer(rank, sizes)
    num_places = state.place.num_places
    for num_tokens in (1, 16, 64, MAX_TOKENS):
        inputs = Inputs(num_tokens, sizes)
        inputs.fill(routings(sizes, num_tokens, rank)["random"][0], 1)
        steps = {
            "bfloat16": (sizes.experts, lambda inputs=inputs: decode(
                buffer, sizes.experts, inputs, lambda topk: topk,
                lambda rows: stock.quant_method.apply(stock, rows),
            )),
            f"resident {sizes.format}": (sizes.ranks * num_places, state.step_of(inputs)),
        }  # fmt: skip
        for name, (num_experts, step) in steps.items():
            torch.cuda.synchronize()
            dist.barrier()
            buffer.clean_low_latency_buffer(MAX_TOKENS, sizes.hidden, num_experts)
            meet()
            median, least, most = median_us(captured(step, sizes.device, meet))
            if rank == 0:
                print(f"{num_tokens} tokens a rank, {name}: layer {median:.1f} us "
                      f"({least:.1f} to {most:.1f})")  # fmt: skip


def run_all(sizes: argparse.Namespace, rank: int) -> None:
    """Store, check and time on this rank."""
    topology = Topology(
        num_layers=1, num_experts=sizes.experts, num_ranks=sizes.ranks, topk=sizes.topk
    )
    place = layout(made_up(sizes), topology, NUM_SLOTS)
    layer = make_layer(rank, sizes)
    low_format = FORMATS[sizes.format]
    stored = store(layer, place, rank=rank, group=dist.group.WORLD, low_format=low_format)
    resident = ResidentExperts([layer], [stored], [place], rank=rank)
    buffer = make_buffer(dist.group.WORLD, sizes, place.num_places)
    num_experts = sizes.ranks * place.num_places

    def step_of(inputs: Inputs) -> Callable[[], torch.Tensor]:
        return lambda: decode(
            buffer, num_experts, inputs,
            lambda topk: resident.physical(0, topk), lambda rows: resident.run(layer, rows),
        )  # fmt: skip

    layers = [make_layer(home, sizes) for home in range(sizes.ranks)]
    state = SimpleNamespace(
        resident=resident, place=place, layers=layers, step_of=step_of, low_format=low_format
    )
    for num_tokens in sizes.tokens:
        check_layer(sizes, rank, num_tokens, state)
    if sizes.device == "cuda" and sizes.ranks <= torch.cuda.device_count():
        compare_times(sizes, rank, buffer, state)


def main() -> None:
    """Parse, begin the group, run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--format", choices=tuple(FORMATS), default="fp8")
    sizes = parser.parse_args()
    small = sizes.device == "cpu"
    sizes.experts, sizes.hidden, sizes.inner, sizes.topk = (
        (24, 128, 128, 4) if small else (128, 2048, 768, 8)
    )
    sizes.tokens = (1, 16) if small else (1, 33, MAX_TOKENS)
    if not small:
        torch.cuda.set_device(local_device())
    dist.init_process_group("gloo" if small else "nccl")
    rank, sizes.ranks = dist.get_rank(), dist.get_world_size()
    try:
        with torch.inference_mode():
            run_all(sizes, rank)
    except SystemExit as error:  # leaving as usual frees DeepEP's buffer, which waits for all ranks
        print(error, file=sys.stderr, flush=True)
        os._exit(1)
    dist.barrier()
    if rank == 0:
        print("ok")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
