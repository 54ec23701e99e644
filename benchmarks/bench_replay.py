"""What a trace takes, and how long a replay of it runs, on one core.

    python -m benchmarks.bench_replay [--passes 1000] [--layers 48] [--experts 128] [--ranks 4]

Goals at the defaults: at most 2 KB a layer and pass, and the basic arms in under 60 s. Prints bytes
a layer and pass, time to encode and decode a pass, and seconds of the basic arms together and of
every other arm alone (with arm none and reading, which every replay does). The trace is synthetic.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median
from time import process_time

from sglang_moelb.replay.arms import ARMS, BASIC, Options
from sglang_moelb.replay.cost import Machine
from sglang_moelb.replay.run import replay_trace, topology_at
from sglang_moelb.trace import codec
from sglang_moelb.trace.reader import open_trace
from sglang_moelb.trace.synthetic import SyntheticLoad, synthesise_trace, synthetic_passes
from sglang_moelb.types import Topology

NUM_TIMED = 20


def sizes_and_times(load: SyntheticLoad) -> str:
    """Bytes a layer and pass, and medians of the time to encode and decode one."""
    num_bytes, encode_ms, decode_ms = [], [], []
    for traced in synthetic_passes(load):
        begun = process_time()
        payload = codec.encode_pass(traced, load.topology)
        encoded = process_time()
        codec.decode_pass(payload, load.topology)
        decode_ms.append(1e3 * (process_time() - encoded))
        encode_ms.append(1e3 * (encoded - begun))
        num_bytes.append(len(payload) / load.topology.num_layers)
    return (
        f"{load.tokens_per_rank} tokens a rank: {median(num_bytes):.0f} bytes a layer and pass "
        f"(largest {max(num_bytes):.0f}); encode {median(encode_ms):.2f} ms, "
        f"decode {median(decode_ms):.2f} ms a pass"
    )


def seconds(folder: Path, names: tuple[str, ...]) -> float:
    """CPU seconds of a replay of the arms `names`."""
    begun = process_time()
    trace = open_trace(folder)
    machine = Machine()
    options = Options(config=trace.config, topology=topology_at(trace, None), machine=machine)
    replay_trace(trace, names, options)
    return process_time() - begun


def main() -> None:
    """Print one line a figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("passes", 1000), ("layers", 48), ("experts", 128), ("ranks", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    topology = Topology(
        num_layers=given.layers, num_experts=given.experts, num_ranks=given.ranks, topk=8
    )
    for tokens in (1024, 16384, 65536):
        load = SyntheticLoad(topology=topology, num_passes=NUM_TIMED, tokens_per_rank=tokens)
        print(sizes_and_times(load))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "trace"
        synthesise_trace(folder, SyntheticLoad(topology=topology, num_passes=given.passes))
        print(f"{given.passes} passes, {topology}")
        print(f"basic arms ({', '.join(BASIC)}): {seconds(folder, BASIC):.1f} s")
        for arm in ARMS:
            if arm not in BASIC:
                print(f"{arm}: {seconds(folder, ('none', arm)):.1f} s")


if __name__ == "__main__":
    main()
