"""Laws of experts in MXFP4: what SGLang's Marlin is called with, and what the host computes for it.

Shape letters: e local experts, N rows, K top-k or features, S rows expert by expert, H hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sglang_moelb.ep.low import marlin, marlin_library
from sglang_moelb.ep.low.marlin import ExpertRows, MarlinWeights
from sglang_moelb.ep.low.marlin_library import SYMBOLS, Symbol, library_refusal
from sglang_moelb.ep.resident.weights import only
from sglang_moelb.ep.standin.experts import run_experts
from sglang_moelb.ep.standin.torchvision_gap import close_torchvision_gap
from sglang_moelb.kernels.block_format import (
    BlockFormat,
    BlockScaled,
    dequantise,
    fake_quantise_fp4,
    unpack_pairs,
)
from sglang_moelb.stored_formats import LOW_BYTES

from .test_resident import Rows

HIDDEN, INNER, NUM_EXPERTS = 256, 128, 4


@pytest.fixture(scope="module", autouse=True)
def sglang() -> None:
    close_torchvision_gap()
    pytest.importorskip("sglang")


def plain() -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(1)
    shapes = {"w13_weight": (2 * INNER, HIDDEN), "w2_weight": (HIDDEN, INNER)}
    return {
        name: (0.1 * torch.randn(NUM_EXPERTS, *shape, generator=drawn)).bfloat16()
        for name, shape in shapes.items()
    }


def stored(experts: Sequence[int] = range(NUM_EXPERTS)) -> MarlinWeights:
    layer = SimpleNamespace(**plain())
    into = marlin.allocate(layer)
    for expert in experts:
        marlin.store(layer, expert, only(into, expert))
    return into


def rows_of(numbers: list[int], room: int, mean: float = 1.0) -> ExpertRows:
    """Rows of each expert; what is of none is NaN."""
    num_rows = room * len(numbers) if room else sum(numbers) + 3
    drawn = torch.Generator().manual_seed(num_rows)
    rows_SH = torch.full((num_rows, HIDDEN), float("nan"), dtype=torch.bfloat16)
    for own in places_of(numbers, room):
        rows_SH[own] = torch.randn(len(own), HIDDEN, generator=drawn).bfloat16()
    counts = torch.tensor(numbers, dtype=torch.int32)
    return ExpertRows(rows_SH=rows_SH, num_rows_e=counts, room=room, mean=mean, place_NK=None)


def places_of(numbers: list[int], room: int) -> list[range]:
    begins = [at * room if room else sum(numbers[:at]) for at in range(len(numbers))]
    return [range(begin, begin + count) for begin, count in zip(begins, numbers, strict=True)]


def test_what_is_called_is_what_the_installed_sglang_has() -> None:
    for symbol in SYMBOLS:
        assert tuple(inspect.signature(symbol.resolved()).parameters) == symbol.params, symbol.name


class Resolved:
    """SGLang's functions by name, in place of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.by_name: dict[str, Callable[..., Any]] = {}
        monkeypatch.setattr(Symbol, "resolved", lambda symbol: self.by_name[symbol.name])
        monkeypatch.setattr(marlin_library, "_e2m1", lambda: "e2m1")


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> Resolved:
    return Resolved(monkeypatch)


def test_a_missing_or_changed_library_or_compiler_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(marlin_library, "_e2m1", lambda: "e2m1")
    monkeypatch.setattr(marlin_library, "_compiler", lambda: "/bin/nvcc")
    assert library_refusal() is None
    monkeypatch.setattr(marlin_library, "_compiler", lambda: "")
    what, why = library_refusal() or ("", "")
    assert "nvcc" in what
    assert "--format fp8" in why
    for change, expected in (
        ({"name": "gone"}, "without sglang.srt.layers.quantization.marlin_utils.gone"),
        ({"params": ("device",)}, "marlin_make_workspace with the parameters device, max_blocks"),
    ):
        changed = replace(marlin_library.MAKE_WORKSPACE, **change)  # type: ignore[arg-type]
        monkeypatch.setattr(marlin_library, "SYMBOLS", (changed,))
        what, _ = library_refusal() or ("", "")
        assert expected in what


def test_room_takes_four_and_a_quarter_bits_a_weight_and_computes_zeros() -> None:
    into = marlin.allocate(SimpleNamespace(**plain()))
    num_weights = NUM_EXPERTS * 3 * HIDDEN * INNER
    assert into.num_bytes == num_weights * 17 // 32 == LOW_BYTES["mxfp4"](num_weights)
    given = rows_of([3, 0, 1, 2], 0)
    out_SH = marlin._run_on_host(given, into)
    assert not out_SH[:6].any()


def test_only_the_expert_asked_for_is_written_and_codes_are_those_of_the_format() -> None:
    all_of, some = stored(), stored((1, 3))
    for name in ("w13", "w2", "w13_scale", "w2_scale"):
        assert torch.equal(getattr(some, name)[1::2], getattr(all_of, name)[1::2])
        assert not getattr(some, name)[::2].any()
    for name, weight in plain().items():
        codes = getattr(all_of, name.removesuffix("_weight"))
        scales = getattr(all_of, name.replace("weight", "scale"))
        values = dequantise(BlockScaled(format=BlockFormat.MXFP4_CEIL, codes=codes, scales=scales))
        exact = fake_quantise_fp4(weight, BlockFormat.MXFP4_CEIL).float()
        assert torch.equal(values, exact)


def test_sglang_is_given_eight_codes_a_word_first_lowest_and_features_behind_each_other(
    resolved: Resolved,
) -> None:
    given: dict[str, Any] = {}
    resolved.by_name["gptq_marlin_repack"] = lambda **named: given.update(named)
    codes_NK = stored().w13[1]
    marlin_library.repacked(codes_NK)
    words = given["b_q_weight"]
    assert words.dtype is torch.int32
    assert words.is_contiguous()
    assert words.shape == (HIDDEN // 8, 2 * INNER)
    assert (given["size_k"], given["size_n"], given["num_bits"]) == (HIDDEN, 2 * INNER, 4)
    assert given["perm"].shape == (0,)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    found_KN = ((words[:, None] >> shifts[:, None]) & 15).flatten(0, 1)
    assert torch.equal(found_KN.T.to(torch.uint8), unpack_pairs(codes_NK))


def test_scales_lie_as_sglang_lays_those_of_its_own_mxfp4_models() -> None:
    from sglang.srt.layers.quantization.marlin_utils import marlin_permute_scales
    from sglang.srt.layers.quantization.marlin_utils_fp4 import mxfp4_marlin_process_scales

    for scales_NK in (stored().w13_scale[2], stored().w2_scale[3]):
        values = scales_NK.view(torch.float8_e8m0fnu).to(torch.bfloat16)
        num_rows, num_groups = scales_NK.shape
        theirs = mxfp4_marlin_process_scales(
            marlin_permute_scales(
                s=values.T.contiguous(), size_k=32 * num_groups, size_n=num_rows, group_size=32
            )
        )
        found = torch.full_like(theirs.view(torch.uint8), 255)
        marlin_library.permute(scales_NK, found)
        assert torch.equal(found, theirs.view(torch.uint8))


def double_of_marlin(calls: list[dict[str, Any]]) -> Callable[..., Tensor]:
    """`moe_wna16_marlin_gemm` on weights that were not repacked, by its tables alone."""

    def gemm(a: Tensor, c: Tensor, codes: Tensor, *rest: Any, **flags: Any) -> Tensor:
        scales, rows, experts, used = rest[1], rest[7], rest[8], rest[9]
        calls.append(flags)
        assert scales.dtype is torch.float8_e8m0fnu
        bytes_eNK = scales.view(torch.uint8).mT.contiguous()
        values = dequantise(
            BlockScaled(format=BlockFormat.MXFP4_CEIL, codes=codes, scales=bytes_eNK)
        )
        c.fill_(float("nan"))
        block = flags["moe_block_size"]
        for at in range(int(used[0]) // block):
            own = rows[at * block : (at + 1) * block]
            own = own[own < flags["size_m"]].long()
            c[own] = (a[own].float() @ values[int(experts[at])].T).bfloat16()
        return c

    return gemm


def activated(given: Tensor, out: Tensor, *_: Any) -> None:
    gate, up = given.float().chunk(2, dim=-1)
    out.copy_(torch.nn.functional.silu(gate) * up)


NUMBERS = {
    "none": [0, 0, 0, 0],
    "one row": [0, 0, 1, 0],
    "one expert": [0, 40, 0, 0],
    "mixed": [33, 0, 1, 8],
}


@pytest.mark.parametrize("room", [0, 40])
@pytest.mark.parametrize("numbers", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("mean", [1.0, 20.0])
def test_what_marlin_is_asked_for_is_what_the_host_computes(
    resolved: Resolved, numbers: list[int], room: int, mean: float
) -> None:
    calls: list[dict[str, Any]] = []
    resolved.by_name |= {
        "moe_wna16_marlin_gemm": double_of_marlin(calls),
        "marlin_make_workspace": lambda device, max_blocks_per_sm: torch.zeros(4),
        "silu_and_mul": activated,
        "silu_and_mul_masked_fwd": activated,
    }
    weights, given = stored(), rows_of(numbers, room, mean)
    transposed = {
        name: getattr(weights, name).mT.contiguous() for name in ("w13_scale", "w2_scale")
    }
    found = marlin._run_on_gpu(given, replace(weights, **transposed))
    expected = marlin._run_on_host(given, weights)
    assert found.shape == expected.shape
    for own in places_of(numbers, room):
        assert torch.equal(found[own], expected[own])
    sizes = [(one["size_m"], one["size_n"], one["size_k"]) for one in calls]
    num_rows = len(given.rows_SH)
    assert sizes == [(num_rows, 2 * INNER, HIDDEN), (num_rows, HIDDEN, INNER)]
    for flags in calls:
        assert not any(flags[name] for name in ("use_atomic_add", "mul_topk_weights", "is_ep"))
        assert flags["use_fp32_reduce"]
        assert flags["moe_block_size"] == (8 if mean == 1.0 else 32)


@pytest.mark.parametrize(
    ("mean", "block"), [(0.0, 8), (7.1, 8), (7.2, 16), (14.4, 32), (57.0, 64), (1e6, 64)]
)
def test_a_block_holds_what_an_expert_has_in_the_mean_with_a_tenth_to_spare(
    mean: float, block: int
) -> None:
    assert marlin.block_of(mean) == block


@pytest.mark.parametrize("spare", [0, 128])
def test_each_row_is_the_weighted_sum_of_its_experts_however_high_the_hosts_counts(
    spare: int,
) -> None:
    drawn = torch.Generator().manual_seed(0)
    x_NH = torch.randn(30, HIDDEN, generator=drawn).bfloat16()
    ids_NK = torch.randint(-1, NUM_EXPERTS, (30, 3), generator=drawn)
    ids_NK[ids_NK == 2] = -1
    ids_NK[4] = -1
    ids_NK[5] = torch.tensor([2, -1, -1])  # the only row of expert 2
    weights_NK = torch.rand(30, 3, generator=drawn)
    counts = ids_NK[ids_NK >= 0].bincount(minlength=NUM_EXPERTS).tolist()
    assert counts[2] == 1
    given = Rows(x_NH, None, ids_NK, weights_NK, [count + spare for count in counts])
    prepared = marlin.quantised(given)
    x_NH.fill_(float("nan"))  # the run of high experts frees them
    rows: ExpertRows = prepared.hidden_states
    assert len(rows.rows_SH) == min(ids_NK.numel(), sum(counts) + 4 * spare)
    assert rows.num_rows_e.tolist() == counts
    out_NH = marlin.run(None, prepared._replace(), stored()).hidden_states
    values = [fake_quantise_fp4(one, BlockFormat.MXFP4_CEIL).float() for one in plain().values()]
    drawn = torch.Generator().manual_seed(0)
    exact_NH = run_experts(
        torch.randn(30, HIDDEN, generator=drawn).bfloat16().float(), ids_NK, weights_NK, *values
    )
    assert (out_NH.float() - exact_NH).norm() <= 2**-7 * exact_NH.norm()
    assert not out_NH[4].any()
