"""The trace of tokens on one GPU: equal to what was routed, without a host sync; then its times.

    python -m tests.gpu.check_token_trace [--rows 16384]

Needs one CUDA device and no SGLang. Exits with an error where a tensor differs or torch reports a
synchronising call in the hand-over. Times are medians over passes: of the host in the hand-over, of
the stream in the copies, and until the pass is written.

Shape letters: L MoE layers, T rows of this rank, K top-k, E logical experts.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from sglang_moelb.config import Config
from sglang_moelb.ep.agreed import Agreed, Sizes
from sglang_moelb.ep.clock import HostMark
from sglang_moelb.ep.records import PassLog
from sglang_moelb.ep.token_trace import TokenTrace
from sglang_moelb.trace.tokens import TokenWriter, open_tokens
from sglang_moelb.types import Lever, Policy, Topology

NUM_LAYERS, NUM_EXPERTS, TOPK = 48, 128, 8
NUM_PASSES = 8


def routed(num_rows: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and weights of each layer, as a router gives them."""
    generator = torch.Generator("cuda").manual_seed(seed)
    layers = []
    for _ in range(NUM_LAYERS):
        scores_TE = torch.rand(num_rows, NUM_EXPERTS, generator=generator, device="cuda")
        weights_TK, ids_TK = scores_TE.topk(TOPK)
        layers.append((ids_TK.int(), weights_TK.softmax(dim=1)))
    return layers


def log_of(step: int, num_rows: int) -> PassLog:
    """The log of a sampled pass before its layers."""
    sizes = Sizes(num_tokens=num_rows, num_prefill_tokens=num_rows, phase="prefill")
    agreed = Agreed(policy=Policy(epoch=0), sizes_R=(sizes,))
    return PassLog(
        step=step,
        agreed=agreed,
        lever=Lever.NONE,
        gate_reason="",
        begun=HostMark(),
        timed=False,
        flags_T=None,
    )


def main() -> None:
    """Check, then print one line of times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=16384)
    num_rows = parser.parse_args().rows
    topology = Topology(num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS, num_ranks=4, topk=TOPK)
    host_ms, stream_ms, written_ms = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        writer = TokenWriter(Path(folder), topology=topology, rank=0, config=Config(), every=1)
        trace = TokenTrace(writer, 1, torch.device("cuda"))
        flags_T = (torch.arange(num_rows, device="cuda") % 4).to(torch.uint8)
        for step in range(NUM_PASSES):
            log = log_of(step, num_rows)
            log.tokens_L = routed(num_rows, step)
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            at = time.perf_counter()
            begun.record()
            trace.add(log, flags_T)
            ended.record()
            host_ms.append(1e3 * (time.perf_counter() - at))
            torch.cuda.set_sync_debug_mode("default")
            for ids_TK, weights_TK in log.tokens_L:  # what SGLang may do next on the stream
                ids_TK.zero_()
                weights_TK.zero_()
            torch.cuda.synchronize()
            stream_ms.append(begun.elapsed_time(ended))
            while trace.stats.num_passes <= step:
                assert trace.stats.state == "running", "the trace stopped"
                time.sleep(0.002)
            written_ms.append(1e3 * (time.perf_counter() - at))
        trace.close()
        found = list(open_tokens(Path(folder)).passes())
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
    assert len(found) == NUM_PASSES
    for step, tokens in enumerate(found):
        for layer, (ids_TK, weights_TK) in enumerate(routed(num_rows, step)):
            assert (tokens.ids_LTK[layer] == ids_TK.cpu().numpy()).all(), (step, layer)
            assert (tokens.weights_LTK[layer] == weights_TK.half().cpu().numpy()).all(), step
        assert (tokens.is_vision_T == ((flags_T & 1) != 0).cpu().numpy()).all()
        assert (tokens.is_protected_T == ((flags_T & 2) != 0).cpu().numpy()).all()
    per_choice = size / (NUM_PASSES * NUM_LAYERS * num_rows * TOPK)
    print(
        f"{torch.cuda.get_device_name()}: {NUM_PASSES} passes of {num_rows} rows equal, no sync; "
        f"hand-over {median(host_ms):.2f} ms (first {host_ms[0]:.1f}), stream "
        f"{median(stream_ms):.2f} ms, written after {median(written_ms):.0f} ms, {per_choice:.2f} "
        "bytes a token, layer and chosen expert"
    )


if __name__ == "__main__":
    main()
