"""A layer is found in a trace, its conversion is measured against the dispatch, and it is drawn."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.draw_layer import draw, kind_of, layer_view, load, work_of
from sglang_moelb.ab.theme import LIGHT, render

MAIN, SIDE, COMM = 7, 20, 21


def event(name: str, stream: int, start: float, length: float) -> dict[str, Any]:
    return {"ph": "X", "cat": "kernel", "name": name, "ts": start, "dur": length,
            "args": {"stream": stream}}  # fmt: skip


def layer(start: float, *, conversion: float, low: bool = True) -> list[dict[str, Any]]:
    """Kernels of a layer of 1,000 us whose dispatch lies between 30 and 330 us."""
    gemm = "void deep_gemm::sm90_fp8_gemm_1d2d_impl<128>(float*)" if low else "gemm_bf16"
    events = [
        event("_count", MAIN, start, 8.0),
        event("_plan", MAIN, start + 12, 6.0),
        event("_convert", SIDE, start + 20, conversion),
        event("void deep_ep::intranode::notify_dispatch<4>(int)", COMM, start + 30, 20.0),
        event("void deep_ep::intranode::dispatch<4, 768>(int4*)", COMM, start + 60, 270.0),
        event("_fwd_kernel_ep_scatter_2", MAIN, start + 340, 60.0),
        event(gemm, MAIN, start + 420, 300.0),
        event("_fwd_kernel_ep_gather", MAIN, start + 720, 50.0),
        event("void deep_ep::intranode::cached_notify_combine<4>(int)", COMM, start + 780, 10.0),
        event("void deep_ep::intranode::combine<bf16, 4>(int4*)", COMM, start + 795, 205.0),
    ]
    return events if low else [one for one in events if one["name"] != "_convert"]


@pytest.fixture
def trace() -> dict[str, Any]:
    """Three layers, of which the first is not lowered; and what is not work of the device."""
    layers = [
        *layer(0.0, conversion=0.0, low=False),
        *layer(2000.0, conversion=100.0),
        *layer(4000.0, conversion=380.0),
    ]
    host = {"ph": "X", "cat": "cpu_op", "name": "_convert", "ts": 5.0, "dur": 9e9, "args": {}}
    return {"traceEvents": [host, *layers, event("rms_norm", MAIN, 5100.0, 900.0)]}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("_convert", "conversion"),
        ("_count", "count, exchange, plan"),
        ("void deep_ep::intranode::dispatch<4, 768>(int4*, combine_t)", "dispatch"),
        ("void deep_ep::intranode::cached_notify_combine<4>(int)", "combine"),
        ("void deep_gemm::sm90_bf16_gemm_impl<1536u>(int)", "grouped GEMM"),
        ("_quantise", "quantise"),
        ("void (anonymous namespace)::act_and_mul_kernel<float>(float*)", "activation"),
        ("void at::native::elementwise_kernel<128>(dispatch)", "other"),
    ],
)
def test_a_kernel_is_known_by_its_name_alone(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_the_longest_conversion_names_the_layer_and_is_measured_against_its_dispatch(
    trace: dict[str, Any],
) -> None:
    view = layer_view(work_of(trace), None)
    assert (view.start_us, view.end_us) == (4000.0, 5000.0)
    # From 20 to 400 us; the dispatch runs from 30 to 50 and from 60 to 330.
    assert (view.conversion_us, view.hidden_us, view.exposed_us) == (380.0, 290.0, 70.0)


def test_a_conversion_that_ends_first_is_not_exposed(trace: dict[str, Any]) -> None:
    view = layer_view(work_of(trace), 0)
    assert (view.start_us, view.end_us) == (2000.0, 3000.0)
    assert (view.conversion_us, view.hidden_us, view.exposed_us) == (100.0, 80.0, 0.0)


def test_a_trace_without_the_lever_is_refused_by_name(trace: dict[str, Any]) -> None:
    with pytest.raises(SystemExit, match="2 conversions: profile a prefill pass"):
        layer_view(work_of(trace), 2)
    with pytest.raises(SystemExit, match="ends before the combine"):
        layer_view(work_of({"traceEvents": trace["traceEvents"][:-4]}), None)


def test_the_picture_is_a_png_from_a_packed_trace(trace: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps(trace).encode()))
    view = layer_view(work_of(load(path)), None)
    png = render(LIGHT, 2.9, lambda figure: draw(figure, view, "a title"))
    assert png.startswith(b"\x89PNG")
    (tmp_path / "layer.png").write_bytes(png)
