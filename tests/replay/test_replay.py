"""A replay as a whole: its decisions, its figures, its files, and what it refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from sglang_moelb.config import Config, merge
from sglang_moelb.replay.arms import ARMS, BASIC, Options, chosen
from sglang_moelb.replay.cli import replay, synthesise
from sglang_moelb.replay.controlled import Auto, decide_again
from sglang_moelb.replay.cost import Machine, fit, layer_error, measured
from sglang_moelb.replay.result import _stretches
from sglang_moelb.replay.run import replay_trace, topology_at
from sglang_moelb.replay.types import ReplayError, Scores
from sglang_moelb.trace.reader import Trace, open_trace
from sglang_moelb.trace.synthetic import SyntheticLoad, synthesise_trace
from sglang_moelb.types import Lever, Topology
from tests.controller import world as simulated
from tests.replay.world import counts, serve_and_trace

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
TOPOLOGY = Topology(num_layers=3, num_experts=16, num_ranks=4, topk=2)
LOAD = SyntheticLoad(topology=TOPOLOGY, num_passes=90, tokens_per_rank=2000, alpha=1.2, seed=1)
# A layer is bound by its rows, so that a lever has something to gain on these few tokens.
SLOW = Machine(ms_per_row=0.01, own_ms=(0.0,) * 5)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    folder = tmp_path_factory.mktemp("trace")
    synthesise_trace(folder, LOAD)
    return open_trace(folder)


def options(trace: Trace, num_ranks: int | None = None, machine: Machine = SLOW) -> Options:
    config = merge(Config(), {"mode": "auto", "controller": {"quality_budget": 0.5}})
    return Options(
        config=config,
        topology=topology_at(trace, num_ranks),
        machine=machine,
        eplb_window=20,
        eplb_interval=20,
        min_rows=10,
    )


def scores(trace: Trace, names: tuple[str, ...], num_ranks: int | None = None) -> dict[str, Scores]:
    replayed = replay_trace(trace, names, options(trace, num_ranks))
    return {one.name: one for one in replayed.scores}


def rows_of_loads(num: int) -> list[tuple[int, ...]]:
    kinds = (simulated.SKEWED, simulated.BALANCED, simulated.MILD)
    return [kinds[(i // 12) % 3] for i in range(num)]


def test_a_replay_makes_the_very_decisions_of_the_run(tmp_path: Path) -> None:
    config = simulated.config(window_passes=8)
    serve_and_trace(tmp_path, config, rows_of_loads(80), {40: simulated.in_mode("drop")})
    fidelity = decide_again(open_trace(tmp_path))
    assert (fidelity.num_decisions, fidelity.num_same) == (80, 80)
    decisions = [one.decision for one in open_trace(tmp_path).passes()]
    assert len({d.lever for d in decisions if d}) > 1


def test_a_decision_that_differs_is_counted_and_shown(tmp_path: Path) -> None:
    config = simulated.config(window_passes=8)
    serve_and_trace(tmp_path, config, rows_of_loads(20), {})
    whole = open_trace(tmp_path)
    header = whole.header
    other = json.loads(json.dumps(header.config))
    other["controller"]["min_gain"] = 0.9
    changed = replace(whole, header=msgspec.structs.replace(header, config=other))
    fidelity = decide_again(changed)
    assert fidelity.num_same < fidelity.num_decisions
    assert "was" in fidelity.first_difference


def test_every_arm_replays_and_ideal_is_the_best_exact_one(trace: Trace) -> None:
    found = scores(trace, chosen("all"))
    assert set(found) == set(ARMS)
    for one in found.values():
        assert one.balance_PL.shape == (90, 3)
        assert (one.balance_PL >= 1.0 - 1e-9).all()
        if one.exact:
            assert one.lost_share_P.sum() == 0
            assert (one.step_ms_P >= found["ideal"].step_ms_P - 1e-9).all()
    for name in ("llep", "ultraep"):
        assert (found[name].step_ms_P <= found["none"].step_ms_P + 1e-9).all()
    assert found["eplb"].balance_PL[20:].mean() < found["none"].balance_PL[20:].mean()
    assert found["drop"].lost_share_P.mean() > 0


def test_the_same_trace_gives_the_same_scores(trace: Trace) -> None:
    first, second = scores(trace, chosen("all")), scores(trace, chosen("all"))
    for name, one in first.items():
        assert (one.step_ms_P == second[name].step_ms_P).all()


def test_auto_acts_where_it_pays_and_sees_what_it_did(trace: Trace) -> None:
    found = scores(trace, ("none", "auto"))
    assert found["auto"].lost_share_P.max() > 0
    assert found["auto"].step_ms_P.mean() < found["none"].step_ms_P.mean()


@pytest.mark.parametrize("is_ready", [False, True])
def test_auto_copies_experts_where_a_server_would_have_room_and_then_loses_no_row(
    trace: Trace, is_ready: bool
) -> None:
    replicate = {"ready": is_ready, "slots": 4, "min_rows": 10}
    config = merge(options(trace).config, {"replicate": replicate})
    found = {
        one.name: one
        for one in replay_trace(
            trace, ("none", "auto", "drop"), replace(options(trace), config=config)
        ).scores
    }
    assert (float(found["auto"].lost_share_P.max()) == 0.0) is is_ready
    assert found["auto"].step_ms_P.mean() < found["none"].step_ms_P.mean()
    if is_ready:
        assert found["auto"].step_ms_P[20:].mean() < found["drop"].step_ms_P[20:].mean()


def test_auto_is_none_where_nothing_can_be_gained(trace: Trace) -> None:
    config = Config(mode="auto")
    rule = Auto(config, TOPOLOGY, Machine(ms_per_row=0.0))
    seen = counts([[[900, 100] * 8] * 3] * 20, num_ranks=4)
    outcome = rule(seen)
    assert outcome.levers_P is not None
    assert set(outcome.levers_P.tolist()) == {Lever.NONE}


@pytest.mark.parametrize("num_ranks", [1, 2, 8, 16])
def test_any_ep_size_that_divides_the_experts_replays(trace: Trace, num_ranks: int) -> None:
    found = scores(trace, chosen("all"), num_ranks)
    balance = found["none"].balance_PL.mean()
    assert balance <= num_ranks
    assert (balance == 1.0) == (num_ranks == 1)


@pytest.mark.parametrize("num_ranks", [0, 3, 32, 512])
def test_an_ep_size_that_does_not_divide_is_refused(trace: Trace, num_ranks: int) -> None:
    with pytest.raises(ReplayError, match=f"--ep {num_ranks}: .*one of 1, 2, 4, 8, 16"):
        topology_at(trace, num_ranks)


def test_an_unknown_arm_is_refused_by_name() -> None:
    with pytest.raises(ReplayError, match="--arms eplp: no such arm"):
        chosen("none,eplp")
    assert chosen("basic") == BASIC
    assert chosen("ideal") == ("none", "ideal")


def test_macs_in_the_loop_is_refused(trace: Trace) -> None:
    config = merge(Config(), {"capacity": {"rule": "macs"}})
    with pytest.raises(ReplayError, match=r"arm auto: capacity.rule 'macs'"):
        Auto(config, TOPOLOGY, Machine())


def test_a_trace_without_prefill_is_refused(tmp_path: Path) -> None:
    serve_and_trace(tmp_path, Config(), [(0,) * 8], {})
    opened = open_trace(tmp_path)
    with pytest.raises(ReplayError, match="1 passes, none of them a prefill"):
        replay_trace(opened, ("none",), options(opened))


def prefill_rows(commit: str, label: str) -> list[dict[str, object]]:
    path = RESULTS / f"prefill_h100x4_20261122_{commit}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if row["label"] == label and row["tokens"] == 4096]


def test_the_default_machine_is_fitted_on_the_h100_runs() -> None:
    fitted = fit(measured(prefill_rows("18fd9dd", "moelb-large")))
    for name in ("fixed_ms", "ms_per_row", "exchange_ms_per_token", "rest_ms_per_token"):
        assert getattr(fitted, name) == pytest.approx(getattr(Machine(), name), rel=1e-3)


def test_the_model_predicts_h100_runs_it_was_not_fitted_on_within_five_per_cent() -> None:
    # The first passes under drop at a new size compile: 2 to 4 times their own time.
    warm = [one for one in measured(prefill_rows("c1134c4", "moelb")) if one.balance_ms < 10]
    errors = [abs(layer_error(Machine(), one)) for one in warm]
    assert len(errors) == 33
    assert max(errors) < 0.05


def test_the_error_of_the_model_is_told_for_a_trace_with_times(tmp_path: Path) -> None:
    serve_and_trace(tmp_path, simulated.config(), rows_of_loads(10), {})
    opened = open_trace(tmp_path)
    made = replay_trace(opened, ("none",), options(opened))
    assert len(made.step_error_P) == 10
    assert all(math.isfinite(error) for error in made.step_error_P)
    elsewhere = replay_trace(opened, ("none",), options(opened, 2))
    assert len(elsewhere.step_error_P) == 0


@pytest.fixture
def app() -> typer.Typer:
    made = typer.Typer()
    made.command("replay")(replay)
    made.command("synthesise")(synthesise)
    return made


def test_the_commands_write_a_trace_and_its_report(app: typer.Typer, tmp_path: Path) -> None:
    folder, out = tmp_path / "trace", tmp_path / "out"
    sizes = {"layers": 2, "experts": 8, "ranks": 2, "topk": 2, "passes": 4, "tokens": 300}
    given = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    made = CliRunner().invoke(app, ["synthesise", str(folder), *given])
    assert made.exit_code == 0, made.output
    told = CliRunner().invoke(app, ["replay", str(folder), "--arms", "all", "--out", str(out)])
    assert told.exit_code == 0, told.output
    result = json.loads((out / "replay.json").read_text())
    assert [arm["name"] for arm in result["arms"]] == list(ARMS)
    assert result["num_prefill_passes"] == 4
    for arm in result["arms"]:
        assert arm["name"] in told.output
        assert len(arm["balance_by_layer"]) == 2
    for name in ("balance-by-layer", "balance-over-time", "saved-and-lost"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_report_comes_without_plots(
    app: typer.Typer, trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sglang_moelb.replay.cli.find_spec", lambda name: None)
    folder = str(trace.files[0].parent)
    told = CliRunner().invoke(app, ["replay", folder, "--out", str(tmp_path)])
    assert told.exit_code == 0, told.output
    assert "without plots (pip install" in told.output
    assert [path.name for path in tmp_path.iterdir()] == ["replay.json"]


def test_an_out_that_cannot_be_written_is_named(
    app: typer.Typer, trace: Trace, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("kept")
    folder = str(trace.files[0].parent)
    told = CliRunner().invoke(app, ["replay", folder, "--out", str(tmp_path / "file")])
    assert told.exit_code == 2
    assert "cannot be written" in told.output
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["replay", "missing"], "missing: no such file or folder"),
        (["replay", "TRACE", "--ep", "5"], "--ep 5: must divide"),
        (["replay", "TRACE", "--arms", "nope"], "--arms nope"),
        (["replay", "TRACE", "--config", '{"mode": "fast"}'], "mode is 'fast'"),
        (["replay", "TRACE", "--machine", '{"ms_per_row": -1}'], "ms_per_row is -1"),
        (["replay", "TRACE", "--machine", '{"ms_per_row": "x"}'], "--machine: Expected `float`"),
        (["replay", "TRACE", "--machine", '{"ms_a_row": 1}'], "no constant 'ms_a_row'"),
        (["replay", "TRACE", "--rank", "9"], "no trace of rank-009"),
        (["synthesise", "TRACE"], "holds a trace of rank 0 already"),
        (["synthesise", "new", "--experts", "9"], "--experts 9"),
    ],
)
def test_a_bad_command_says_what_and_how_and_exits_with_2(
    app: typer.Typer,
    trace: Trace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = str(trace.files[0].parent)
    told = CliRunner().invoke(app, [folder if a == "TRACE" else a for a in arguments])
    assert told.exit_code == 2
    assert message in " ".join(told.output.split())
    assert not (tmp_path / "replay-out").exists()


def test_balance_over_time_covers_all_passes(trace: Trace) -> None:
    values = np.arange(450, dtype=np.float64)
    assert _stretches(values).tolist() == [3.0 * i + 1.0 for i in range(150)]
    assert _stretches(values[:3]).tolist() == [0.0, 1.0, 2.0]
