"""The load that benchmarks impose: exactly the skew asked for, the same pass on all ranks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import compare_passes, skew_plugin
from benchmarks.gpu.bench_prefill import REBALANCED, Server
from benchmarks.gpu.skew_plugin import Load, begin_pass, imposed_ids, skewed_ids

NUM_EXPERTS, TOPK, NUM_TOKENS = 128, 8, 2048


@pytest.fixture
def load_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "skew"
    monkeypatch.setenv(skew_plugin.VARIABLE, str(path))
    monkeypatch.setattr(skew_plugin, "_now", skew_plugin.Imposed())
    return path


def write(path: Path, text: str) -> None:
    """Two writes within the clock of the file system are two loads all the same."""
    stamp = path.stat().st_mtime_ns if path.exists() else 0
    path.write_text(text)
    os.utime(path, ns=(stamp + 1, stamp + 1))


def hot_rank(ids: torch.Tensor, num_ranks: int) -> tuple[int, float]:
    """The rank with most rows, and its rows over the mean."""
    rows_R = torch.bincount((ids // (NUM_EXPERTS // num_ranks)).flatten(), minlength=num_ranks)
    return int(rows_R.argmax()), float(rows_R.max() * num_ranks / rows_R.sum())


def imposed(layer: int, num_ranks: int) -> torch.Tensor:
    routed = torch.arange(TOPK).repeat(NUM_TOKENS, 1)
    return imposed_ids(routed, layer, num_ranks, NUM_EXPERTS)


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("skew", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("num_hot", [0, 8])
def test_a_token_meets_distinct_experts_and_the_skew_is_exact(
    num_ranks: int, skew: float, num_hot: int
) -> None:
    first = NUM_EXPERTS // num_ranks
    ids = skewed_ids(skew, 1, num_ranks, NUM_EXPERTS, TOPK, None, first, num_hot)[:NUM_TOKENS]
    assert (ids.sort(dim=1).values.diff(dim=1) > 0).all()
    assert ids.min() >= 0
    assert ids.max() < NUM_EXPERTS
    assert ((ids // first == 1).sum(dim=1) == TOPK * skew / num_ranks).all()
    if num_hot:
        own = ids[(ids >= first) & (ids < 2 * first)]
        assert set(own.tolist()) == set(range(first, first + num_hot))


@pytest.mark.parametrize(
    ("text", "ranks_of_layers_by_pass"),
    [
        ("2", [[0, 1, 0], [0, 1, 0]]),
        ("2 moving", [[1, 0, 1], [0, 1, 0]]),
        ("2 still", [[0, 0, 0], [0, 0, 0]]),
        ("2 opposite", [[1, 1, 1], [1, 1, 1]]),
    ],
)
def test_the_hot_rank_is_that_of_the_form(
    load_file: Path, text: str, ranks_of_layers_by_pass: list[list[int]]
) -> None:
    write(load_file, text)
    for ranks_L in ranks_of_layers_by_pass:
        begin_pass([NUM_TOKENS, NUM_TOKENS])
        assert [hot_rank(imposed(layer, 2), 2)[0] for layer in range(3)] == ranks_L


def test_small_and_idle_passes_move_no_hot_spot(load_file: Path) -> None:
    """A rank with few tokens counts as the one with many: the hot rank is the same on both."""
    write(load_file, "2 moving")
    ranks = []
    for num_tokens_R in ([NUM_TOKENS, 0], [1, 1], [0, NUM_TOKENS], [4, 0], [NUM_TOKENS, 70]):
        begin_pass(num_tokens_R)
        ranks.append(hot_rank(imposed(0, 2), 2)[0])
    assert ranks == [1, 1, 0, 0, 1]


def test_moving_hot_experts_come_to_all_experts_alike(load_file: Path) -> None:
    write(load_file, "2 moving experts=8")
    rows_E = torch.zeros(NUM_EXPERTS, dtype=torch.int64)
    for _ in range(NUM_EXPERTS // 8):
        begin_pass([NUM_TOKENS])
        rows_E += torch.bincount(imposed(0, 2).flatten(), minlength=NUM_EXPERTS)
    assert set(rows_E.tolist()) == {NUM_TOKENS}


@pytest.mark.parametrize("text", ["2 sideways", "2 experts", "2 heat=3", "hot"])
def test_a_load_that_says_nothing_known_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"sideways|experts|heat|hot"):
        Load.parse(text)


def test_a_load_is_read_with_its_label() -> None:
    load = Load.parse("1.5 still experts=8 vision=0.9 | auto")
    assert (load.skew, load.form, load.num_hot, load.vision) == (1.5, "still", 8, 0.9)
    assert (load.words, load.label) == ("1.5 still experts=8 vision=0.9", "auto")


def test_without_a_load_and_in_padding_the_router_is_left_alone(load_file: Path) -> None:
    write(load_file, "0")
    begin_pass([NUM_TOKENS])
    assert (imposed(0, 2) == torch.arange(TOPK)).all()
    write(load_file, "2")
    begin_pass([NUM_TOKENS])
    routed = torch.arange(TOPK).repeat(NUM_TOKENS, 1)
    routed[-3:] = -1
    ids = imposed_ids(routed, 0, 2, NUM_EXPERTS)
    assert (ids[-3:] == -1).all()
    assert (ids[:-3] < NUM_EXPERTS // 2).all()


def test_eplb_sees_the_load_as_logical_experts_and_spreads_it(
    load_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang's own map follows the hook, so a layout that swaps experts halves the hot rank's."""
    topk = pytest.importorskip("sglang.srt.layers.moe.topk")
    context = pytest.importorskip("sglang.srt.runtime_context")
    from sglang.srt.eplb.expert_location_dispatch import ExpertLocationDispatchInfo

    monkeypatch.setattr(
        context, "get_parallel", lambda: type("Two", (), {"moe_ep_size": 2, "tp_rank": 0})()
    )
    monkeypatch.setattr(topk, "capture_routed_experts_if_allowed", lambda *args: None)
    monkeypatch.setattr(topk, "has_per_rank_fused_shared_slots", lambda *args: False)
    write(load_file, "2 still")
    begin_pass([NUM_TOKENS])
    swapped = torch.arange(NUM_EXPERTS).view(2, -1).T.reshape(-1).argsort()
    info = ExpertLocationDispatchInfo(
        "static", swapped, torch.arange(NUM_EXPERTS)[:, None], torch.ones(NUM_EXPERTS), NUM_EXPERTS
    )
    config = type("Config", (), {"num_shared_topk_slots": 0, "top_k": TOPK,
                                 "fused_shared_experts_scaling_factor": None})()  # fmt: skip

    def mapped(info: Any) -> torch.Tensor:
        ids, _, recorded = skew_plugin._impose(
            topk._post_process_topk_ids,
            topk_ids=torch.arange(TOPK).repeat(NUM_TOKENS, 1),
            topk_weights=torch.ones(NUM_TOKENS, TOPK), topk_config=config,
            router_logits=torch.zeros(NUM_TOKENS, NUM_EXPERTS), layer_id=0,
            expert_location_dispatch_info=info,
        )  # fmt: skip
        assert (ids == recorded).all(), "the recorder sees what is dispatched"
        return torch.as_tensor(ids)

    assert hot_rank(mapped(None), 2) == (0, 2.0)
    assert torch.equal(mapped(None), imposed(0, 2)), "without EPLB the map changes nothing"
    assert torch.equal(mapped(info), swapped[imposed(0, 2)])
    assert hot_rank(mapped(info), 2)[1] == pytest.approx(1.0, abs=0.02)
    skew_plugin.end_pass(lambda rows_LR: rows_LR.mul_(2))
    rows_LR = skew_plugin.take_rows()
    assert rows_LR is not None
    assert rows_LR[0].tolist() == [2 * NUM_TOKENS * TOPK, 0]
    assert rows_LR[-1].max() < 2.1 * NUM_TOKENS * TOPK / 2
    assert skew_plugin.take_rows() is None


def test_the_servers_modes_and_rebalances_are_read() -> None:
    server = Server.parse("eplb=http://127.0.0.1:2=eplb,eplb@2 opposite experts=8")
    assert server.modes == ("eplb", "eplb@2 opposite experts=8")
    log = """[2026-11-23 01:00:00 DP0 TP0 EP0] [EPLBManager] rebalance end time=0.125s
[2026-11-23 01:00:00 DP1 TP1 EP1] [EPLBManager] rebalance end time=0.126s
[2026-11-23 01:00:01 DP0 TP0 EP0] [EPLBManager] rebalance start"""
    assert REBALANCED.findall(log) == ["0.125"]


def test_the_table_keeps_loads_and_modes_apart_and_leaves_learning_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def row(number: int, load: str, label: str, device_ms: float) -> dict[str, Any]:
        return {"begun_s": 0.1 * number, "num_tokens": 16384, "lever": "", "load": load,
                "label": label, "host_ms": 1.0, "parts_us": {}, "device_ms": device_ms,
                **({"routed_rows_LR": [[3, 1], [2, 2]]} if number % 4 == 0 else {})}  # fmt: skip

    rows = [row(n, "2", "learning", 500.0) for n in range(4)]
    rows += [row(n, "2", "eplb", 105.0) for n in range(4, 8)]
    rows += [row(n, "2 moving", "eplb", 130.0) for n in range(8, 13)]
    (tmp_path / "passes-eplb-large.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr("sys.argv", ["compare_passes", str(tmp_path)])
    compare_passes.main()
    said = capsys.readouterr().out
    assert "4 passes of 16384 tokens, skew 2, mode eplb" in said
    assert "4 passes of 16384 tokens, skew 2 moving, mode eplb" in said
    assert "mean 1.250, worst layer 1.500" in said
    assert "500.0" not in said
