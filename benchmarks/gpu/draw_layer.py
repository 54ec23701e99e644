"""Draw one MoE layer under the lever downgrade: streams by time, from a profiler trace.

    python -m benchmarks.gpu.draw_layer trace.json.gz --out docs/downgrade-layer.png

The trace is one of torch.profiler: from `benchmarks/gpu/record_layer.py`, or of a server with
`curl -X POST localhost:30000/start_profile -d '{"activities": ["GPU"], "num_steps": 4}'`. Shown is
the layer whose conversion takes longest, from the counting of its rows to the end of its combine;
`--layer 3` asks for the conversion that comes fourth. Needs no GPU.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from sglang_moelb.ab.theme import LIGHT, SERIES, render

DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
# The first that fits names the kind of a kernel. Our Triton kernels have short names.
KINDS = (
    ("conversion", r"^_convert"),
    ("count, exchange, plan", r"^_(count|plan)|barrier|multimem|one_shot"),
    ("combine", r"combine"),
    ("dispatch", r"dispatch"),
    ("quantise", r"^_quantise|group_quant"),
    ("scatter, gather", r"ep_scatter|ep_gather"),
    ("grouped GEMM", r"deep_gemm|gemm"),
    ("activation", r"act_and_mul|silu"),
)
OTHER = "other"
COLOURS = {name: SERIES[i] for i, (name, _) in enumerate(KINDS)} | {OTHER: "#C9CDD3"}
CONVERSION, PLAN, COMBINE, DISPATCH = (KINDS[i][0] for i in range(4))
LABEL_SHARE = 0.06  # bars shorter than this part of the layer go without a text


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One kernel, copy or fill on the device; microseconds."""

    kind: str
    stream: int
    start_us: float
    end_us: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerView:
    """What a device did in one layer, with the figures of its conversion in microseconds."""

    work: tuple[Work, ...]
    start_us: float
    end_us: float
    conversion_us: float
    hidden_us: float  # conversion at the same time as dispatch kernels
    exposed_us: float  # from the end of the dispatch to that of the conversion

    def told(self) -> str:
        """One line."""
        return (
            f"conversion {self.conversion_us:.0f} us, {self.hidden_us:.0f} us of it while the "
            f"dispatch ran, and {self.exposed_us:.0f} us after its end; layer "
            f"{self.end_us - self.start_us:.0f} us"
        )


def kind_of(name: str) -> str:
    """The kind of a kernel by its name, templates and arguments cut off."""
    plain = re.sub(r"^void |\(anonymous namespace\)::", "", name).split("<")[0].split("(")[0]
    return next((kind for kind, pattern in KINDS if re.search(pattern, plain)), OTHER)


def load(path: Path) -> dict[str, Any]:
    """A trace in JSON, packed or not."""
    packed = path.read_bytes()
    trace: dict[str, Any] = json.loads(gzip.decompress(packed) if path.suffix == ".gz" else packed)
    return trace


def work_of(trace: dict[str, Any]) -> list[Work]:
    """All work of the device, in the order in which it began."""
    found = [
        Work(
            kind=kind_of(event["name"]),
            stream=int(event["args"]["stream"]),
            start_us=float(event["ts"]),
            end_us=float(event["ts"]) + float(event["dur"]),
        )
        for event in trace["traceEvents"]
        if event.get("ph") == "X" and event.get("cat") in DEVICE_WORK
    ]
    return sorted(found, key=lambda one: one.start_us)


def layer_view(work: Sequence[Work], layer: int | None) -> LayerView:
    """The layer of a conversion: the `layer`-th, or the longest; SystemExit where there is none."""
    conversions = [one for one in work if one.kind == CONVERSION]
    if not conversions or (layer is not None and layer >= len(conversions)):
        raise SystemExit(
            f"the trace has {len(conversions)} conversions: profile a prefill pass in mode "
            "downgrade, in which a rank is lowered"
        )
    chosen = conversions[layer] if layer is not None else max(conversions, key=_length)
    before = [one.start_us for one in work if one.kind == PLAN and one.end_us <= chosen.start_us]
    earlier = [one.end_us for one in work if one.kind == COMBINE and one.end_us <= chosen.start_us]
    start = min((us for us in before if us >= max(earlier, default=0.0)), default=chosen.start_us)
    after = [one for one in work if one.kind == COMBINE and one.start_us >= chosen.start_us]
    if not after:
        raise SystemExit("the trace ends before the combine of that layer: profile a whole pass")
    # Several kernels make a combine; the last one before other work of its stream ends it.
    end = after[0].end_us
    for one in after[1:]:
        if any(w.kind == PLAN and end <= w.start_us <= one.start_us for w in work):
            break
        end = max(end, one.end_us)
    inside = tuple(one for one in work if one.end_us > start and one.start_us < end)
    dispatches = [one for one in inside if one.kind == DISPATCH and one.start_us >= start]
    return LayerView(
        work=inside,
        start_us=start,
        end_us=end,
        conversion_us=_length(chosen),
        hidden_us=_overlap(chosen, dispatches),
        exposed_us=max(
            0.0, chosen.end_us - max((d.end_us for d in dispatches), default=chosen.start_us)
        ),
    )


def _length(one: Work) -> float:
    return one.end_us - one.start_us


def _overlap(one: Work, others: Iterable[Work]) -> float:
    """Microseconds of `one` in which any of `others` runs."""
    total, covered = 0.0, one.start_us
    for other in sorted(others, key=lambda work: work.start_us):
        begin = max(covered, other.start_us)
        end = min(one.end_us, other.end_us)
        total += max(0.0, end - begin)
        covered = max(covered, end)
    return total


def draw(figure: Figure, view: LayerView, title: str) -> None:
    """Bars by stream; a stream is named by the kind it spends most time with."""
    axes = figure.subplots()
    streams = sorted({one.stream for one in view.work})
    length = view.end_us - view.start_us
    for place, stream in enumerate(streams):
        for one in (one for one in view.work if one.stream == stream):
            begin = max(one.start_us, view.start_us) - view.start_us
            width = min(one.end_us, view.end_us) - view.start_us - begin
            axes.barh(place, width, left=begin, height=0.6, color=COLOURS[one.kind], linewidth=0)
            if width > LABEL_SHARE * length:
                at = (begin + width / 2, place)
                text = f"{_length(one):.0f}"
                axes.text(*at, text, ha="center", va="center", fontsize=6, color="white")
    axes.set_yticks(range(len(streams)), [_stream_name(view, stream) for stream in streams])
    axes.invert_yaxis()
    axes.set_xlim(0, length)
    axes.set_xlabel("microseconds since the layer's rows were counted")
    axes.set_title(f"{title}\n{view.told()}" if title else view.told(), fontsize=8)
    axes.grid(axis="y", visible=False)
    shown = [kind for kind in COLOURS if any(one.kind == kind for one in view.work)]
    handles = [Patch(color=COLOURS[kind], label=kind) for kind in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=7, frameon=False)


def _stream_name(view: LayerView, stream: int) -> str:
    mine = [one for one in view.work if one.stream == stream]
    kinds = {one.kind for one in mine}
    longest = max(kinds, key=lambda kind: sum(_length(one) for one in mine if one.kind == kind))
    names = {CONVERSION: "ours, beside", DISPATCH: "DeepEP", COMBINE: "DeepEP"}
    return f"{names.get(longest, 'SGLang')}\n(stream {stream})"


def main() -> None:
    """Draw a trace; prints the figures."""
    parser = argparse.ArgumentParser(description="Draw one MoE layer of a profiler trace.")
    parser.add_argument("trace", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    parser.add_argument("--layer", type=int, help="which conversion of the trace (default longest)")
    parser.add_argument("--title", default="")
    args = parser.parse_args()
    view = layer_view(work_of(load(args.trace)), args.layer)
    args.out.write_bytes(render(LIGHT, 2.9, lambda figure: draw(figure, view, args.title)))
    print(view.told())


if __name__ == "__main__":
    main()
