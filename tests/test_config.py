"""Laws of the configuration tree: its knobs, what it refuses, and how it travels."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_moelb.config import (
    CHOICES,
    CONFIG_VARIABLE,
    TRACE_VARIABLE,
    Config,
    ConfigError,
    flat,
    from_environment,
    knobs,
    load,
    merge,
    parse,
    policy_of,
    to_environment,
    trace_folder,
    trace_tokens,
)
from sglang_moelb.controller.encode import FIELDS, decode, encode
from sglang_moelb.environment import STANDIN_VARIABLE, standin_requested
from sglang_moelb.hot_config import (
    START_KNOBS,
    from_numbers,
    refuse_beside_resident,
    refuse_change,
    to_numbers,
)
from sglang_moelb.types import (
    MODES,
    Expansion,
    Form,
    Level,
    Lever,
    Metric,
    Preference,
    Rule,
    Scope,
)

KNOBS = {
    "mode": "none",
    "capacity.factor": 1.25,
    "capacity.level": "device",
    "capacity.scope": "global",
    "capacity.metric": "score",
    "capacity.preference": "uniform",
    "capacity.rule": "plain",
    "capacity.expansion": "fill",
    "capacity.renormalise": False,
    "capacity.max_extra_experts": 0,
    "capacity.macs_delta": 1.0,
    "capacity.macs_rho": 0.5,
    "capacity.min_batch_tokens": 2048,
    "downgrade.factor": 1.0,
    "downgrade.vision_share": 0.7,
    "downgrade.form": "rank",
    "downgrade.ready": False,
    "downgrade.format": "auto",
    "downgrade.slots": 2,
    "downgrade.resident_layers": "",
    "replicate.min_rows": 256,
    "replicate.send_rows": 0,
    "replicate.receive_rows": 0,
    "replicate.ready": False,
    "replicate.slots": 8,
    "resident.placement": "",
    "resident.recalibrate": False,
    "resident.move_ms": 1.0,
    "resident.window_passes": 128,
    "resident.min_gain": 0.05,
    "resident.split": "even",
    "controller.window_passes": 32,
    "controller.min_gain": 0.02,
    "controller.switch_margin": 0.01,
    "controller.min_dwell_passes": 4,
    "controller.quality_budget": 0.05,
    "controller.downgrade_budget": 1.0,
    "controller.quality_window_passes": 256,
    "controller.interval_ms": 100.0,
    "controller.timeout_ms": 100.0,
    "verdict.enabled": False,
    "verdict.window_passes": 2048,
    "verdict.log_interval_s": 60.0,
    "fault.controller": "none",
}

share = st.floats(0, 1)
factor = st.floats(1e-6, 1000)
trees = st.fixed_dictionaries(
    {},
    optional={
        "mode": st.sampled_from(MODES),
        "capacity": st.fixed_dictionaries(
            {},
            optional={
                "factor": factor,
                "level": st.sampled_from(CHOICES["capacity.level"]),
                "scope": st.sampled_from(CHOICES["capacity.scope"]),
                "metric": st.sampled_from(CHOICES["capacity.metric"]),
                "preference": st.sampled_from(CHOICES["capacity.preference"]),
                "rule": st.sampled_from(CHOICES["capacity.rule"]),
                "expansion": st.sampled_from(CHOICES["capacity.expansion"]),
                "renormalise": st.booleans(),
                "max_extra_experts": st.integers(0, 24),
                "macs_delta": factor,
                "macs_rho": share,
                "min_batch_tokens": st.integers(0, 2**31 - 1),
            },
        ),
        "downgrade": st.fixed_dictionaries(
            {},
            optional={
                "factor": st.floats(1e-6, 100),
                "vision_share": share,
                "form": st.sampled_from(CHOICES["downgrade.form"]),
                "ready": st.booleans(),
                "format": st.sampled_from(CHOICES["downgrade.format"]),
                "slots": st.integers(0, 2),
                "resident_layers": st.sampled_from(["", "all", "0", "1,3-5"]),
            },
        ),
        "replicate": st.fixed_dictionaries(
            {},
            optional={
                "min_rows": st.integers(1, 2**20),
                "send_rows": st.integers(0, 2**20),
                "receive_rows": st.integers(0, 2**20),
                "ready": st.booleans(),
                "slots": st.integers(0, 255),
            },
        ),
        "resident": st.fixed_dictionaries(
            {},
            optional={
                "placement": st.just("p.json"),
                "recalibrate": st.booleans(),
                "split": st.sampled_from(["even", "quota"]),
                "move_ms": st.floats(0, 1000),
                "window_passes": st.integers(2, 4096),
                "min_gain": share,
            },
        ),
        "controller": st.fixed_dictionaries(
            {},
            optional={
                "window_passes": st.integers(1, 4096),
                "min_gain": share,
                "switch_margin": share,
                "min_dwell_passes": st.integers(1, 65536),
                "quality_budget": share,
                "downgrade_budget": share,
                "quality_window_passes": st.integers(1, 65536),
                "interval_ms": st.floats(0, 60_000),
                "timeout_ms": st.floats(1e-3, 1e9),
            },
        ),
        "verdict": st.fixed_dictionaries(
            {},
            optional={
                "enabled": st.booleans(),
                "window_passes": st.integers(64, 65536),
                "log_interval_s": st.floats(0.1, 86_400),
            },
        ),
        "fault": st.fixed_dictionaries(
            {}, optional={"controller": st.sampled_from(CHOICES["fault.controller"])}
        ),
    },
)


def test_the_knobs_and_their_defaults_are_these() -> None:
    assert flat(Config()) == KNOBS
    assert knobs() == list(KNOBS)


@given(trees)
def test_a_configuration_survives_each_way_it_travels(tree: dict[str, Any]) -> None:
    config = parse(tree)
    assert from_numbers(to_numbers(config), config) == config
    assert parse(load(config.to_json())) == config
    assert merge(Config(), tree) == config
    assert merge(config, {}) == config


@given(trees)
def test_what_travels_in_a_state_update_is_plain_numbers(tree: dict[str, Any]) -> None:
    config = parse(tree)
    numbers = to_numbers(config)
    assert set(numbers) == set(knobs()) - set(START_KNOBS)
    assert all(isinstance(value, int | float) for value in numbers.values())
    again = json.loads(json.dumps({k: v + 0 for k, v in numbers.items()}))
    assert from_numbers(again, config) == config


@given(trees)
def test_every_policy_of_every_configuration_fits_the_agreement(tree: dict[str, Any]) -> None:
    policy = policy_of(parse(tree), Lever.DROP, epoch=3, reason="here")
    words = encode(policy)
    assert all(-(2**63) <= word < 2**63 for word in words)
    agreed = decode(words, reason="there")
    assert agreed.capacity_factor > 0
    assert agreed.macs_delta > 0
    assert agreed.capacity_factor == pytest.approx(policy.capacity_factor, abs=1e-6)


def test_a_policy_of_downgrade_has_the_knobs_of_downgrade_and_other_levers_their_own() -> None:
    config = parse(
        {
            "capacity": {"factor": 2.0},
            "downgrade": {"factor": 1.5, "vision_share": 0.5, "form": "fewest"},
        }
    )
    policy = policy_of(config, Lever.DOWNGRADE, epoch=1, reason="")
    assert (policy.capacity_factor, policy.vision_share) == (1.5, 0.5)
    assert policy.form is Form.FEWEST
    assert policy_of(config, Lever.DROP, epoch=1, reason="").capacity_factor == 2.0


def test_a_policy_of_replicate_has_the_knobs_of_replicate_and_they_travel() -> None:
    config = parse({"replicate": {"min_rows": 384, "send_rows": 5, "receive_rows": 7}})
    policy = policy_of(config, Lever.REPLICATE, epoch=1, reason="")
    agreed = decode(encode(policy), reason="")
    assert agreed == policy
    assert (agreed.min_copy_rows, agreed.send_rows, agreed.receive_rows) == (384, 5, 7)


def test_a_policy_has_the_capacity_knobs_of_its_configuration() -> None:
    tree = {
        "factor": 2.0, "level": "expert", "scope": "source", "metric": "random",
        "preference": "text-first", "rule": "macs", "renormalise": True, "max_extra_experts": 5,
        "expansion": "compete", "macs_delta": 3.0, "macs_rho": 0.25, "min_batch_tokens": 9,
    }  # fmt: skip
    policy = policy_of(parse({"capacity": tree}), Lever.EXPAND, epoch=4, reason="why")
    assert (policy.epoch, policy.lever, policy.reason) == (4, Lever.EXPAND, "why")
    assert policy.capacity_factor == 2.0
    assert (policy.level, policy.scope) == (Level.EXPERT, Scope.SOURCE)
    assert (policy.metric, policy.preference) == (Metric.RANDOM, Preference.TEXT_FIRST)
    assert (policy.rule, policy.renormalise) == (Rule.MACS, True)
    assert policy.expansion is Expansion.COMPETE
    assert (policy.max_extra_experts, policy.min_batch_tokens) == (5, 9)
    assert (policy.macs_delta, policy.macs_rho) == (3.0, 0.25)
    assert set(FIELDS) | {"split", "reason"} == set(type(policy).__slots__)


BAD: dict[str, list[Any]] = {
    "mode": ["fast", "", 1, None, True, ["drop"], {"drop": 1}],
    "capacity.factor": [0, -1, 0.0, 1e-9, 1001, 1e300, "1", None, True, [1], {"a": 1}],
    "capacity.level": ["host", 0, None],
    "capacity.scope": ["all", 1],
    "capacity.metric": ["best", None],
    "capacity.preference": ["image_first", 2],
    "capacity.rule": ["MACS", False],
    "capacity.expansion": ["both", 1, None],
    "capacity.renormalise": [0, 1, "true", None],
    "capacity.max_extra_experts": [-1, 25, 1.5, "3"],
    "capacity.macs_delta": [0, -2, 1e9, "x"],
    "capacity.macs_rho": [-0.1, 1.1, "x"],
    "capacity.min_batch_tokens": [-1, 2**31, 2**70, 0.5],
    "downgrade.factor": [0, -1, 101, "1", None],
    "downgrade.vision_share": [-0.1, 1.1, "x"],
    "downgrade.form": ["row", 0, None],
    "downgrade.ready": [0, 1, "true", None],
    "downgrade.format": ["fp4", 1, None],
    "downgrade.slots": [-1, 3, 1.5],
    "downgrade.resident_layers": ["none", "0,", "1-", "-1", 3, None, [1]],
    "replicate.min_rows": [0, -1, 2**20 + 1, 1.5, None],
    "replicate.send_rows": [-1, 2**20 + 1, 0.5, "x"],
    "replicate.receive_rows": [-1, 2**20 + 1, 0.5, "x"],
    "replicate.ready": [0, 1, "true", None],
    "replicate.slots": [-1, 256, 1.5, None],
    "resident.placement": [1, None, True],
    "resident.recalibrate": [0, 1, "true", None],
    "resident.move_ms": [-0.1, 1001, "1ms", None],
    "resident.window_passes": [0, 1, 4097, 1.5],
    "resident.min_gain": [-0.01, 1.01, "x"],
    "resident.split": ["Quota", "", 1, None],
    "controller.window_passes": [0, -1, 4097, 1.5],
    "controller.min_gain": [-0.01, 1.01, "x"],
    "controller.switch_margin": [-0.01, 2],
    "controller.min_dwell_passes": [0, 2**70],
    "controller.quality_budget": [-0.01, 1.01, None],
    "controller.downgrade_budget": [-0.01, 1.01, None],
    "controller.quality_window_passes": [0, 65537],
    "controller.interval_ms": [-1, 60_001, "often"],
    "controller.timeout_ms": [0, -1, 1e12, "fast"],
    "verdict.enabled": [0, 1, "true", None],
    "verdict.window_passes": [63, 65537, 1.5],
    "verdict.log_interval_s": [0, -1, 86_401, "often"],
    "fault.controller": ["explode", 1, None],
}
NOT_FINITE = [float("nan"), float("inf"), float("-inf")]


def tree_of(knob: str, value: Any) -> dict[str, Any]:
    *sections, key = knob.split(".")
    return {sections[0]: {key: value}} if sections else {key: value}


def test_every_knob_has_wrong_values_in_this_test() -> None:
    assert list(BAD) == list(KNOBS)


@pytest.mark.parametrize("knob", BAD)
def test_a_wrong_value_is_an_error_that_names_knob_value_and_fix(knob: str) -> None:
    values = BAD[knob] + (NOT_FINITE if isinstance(KNOBS[knob], float) else [])
    for value in values:
        for make in (parse, lambda tree: merge(Config(), tree)):
            with pytest.raises(ConfigError) as caught:
                make(tree_of(knob, value))
            message = str(caught.value)
            assert knob in message
            if value is not None and value == value:
                assert repr(value) in message, message
            fixes = ("Expected `", "use one of ", "must be a finite number")
            assert any(fix in message for fix in fixes), message
            assert "\n" not in message


@pytest.mark.parametrize(
    ("tree", "name"),
    [
        ({"modus": 1}, "'modus'"),
        ({"capacity": {"fac": 1}}, "'capacity.fac'"),
        ({"controller": {"capacity.factor": 1}}, "'controller.capacity.factor'"),
        ({"capacity": 3}, "capacity must be an object, found 3"),
        ({"fault": None}, "fault must be an object, found None"),
    ],
)
def test_an_unknown_knob_or_section_is_named_and_the_known_ones_are_told(
    tree: dict[str, Any], name: str
) -> None:
    before = Config(mode="drop")
    with pytest.raises(ConfigError, match=name):
        merge(before, tree)
    assert before == Config(mode="drop")


@pytest.mark.parametrize(
    "numbers",
    [
        {"mode": 99},
        {"mode": -1},
        {"mode": 0.5},
        {"mode": float("nan")},
        {"mode": len(MODES)},
        {"capacity.level": 2},
        {"capacity.factor": float("nan")},
        {"capacity.factor": -1},
        {"capacity.min_batch_tokens": 2**70},
        {"capacity.max_extra_experts": 1.5},
        {"unheard.of": 1},
        {"downgrade.slots": 1},
        {"replicate.slots": 1},
        {"resident.placement": 1},
        {"resident.recalibrate": 1},
    ],
)
def test_numbers_that_mean_nothing_are_an_error(numbers: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        from_numbers(numbers)


def test_the_environment_carries_the_tree_and_its_absence_means_not_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(CONFIG_VARIABLE, "")
    assert from_environment() is None
    monkeypatch.delenv(CONFIG_VARIABLE)
    assert from_environment() is None
    monkeypatch.setenv(CONFIG_VARIABLE, "{}")  # so that what is set below is taken back
    config = merge(Config(), {"mode": "drop", "capacity": {"factor": 1.5}})
    to_environment(config)
    assert from_environment() == config


@pytest.mark.parametrize("folder", ["some/folder", "/with:colon/and space", ""])
def test_the_environment_carries_what_to_trace(
    monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.setenv(CONFIG_VARIABLE, "")
    monkeypatch.setenv(TRACE_VARIABLE, "")
    assert (trace_folder(), trace_tokens()) == ("", 0)
    to_environment(Config(), folder or None, 16 if folder else 0)
    assert (trace_folder(), trace_tokens()) == (folder, 16 if folder else 0)


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("0", False), ("", False)])
def test_the_stand_in_is_asked_for_by_its_variable(
    monkeypatch: pytest.MonkeyPatch, value: str, expected: bool
) -> None:
    monkeypatch.setenv(STANDIN_VARIABLE, value)
    assert standin_requested() is expected


def test_register_without_flags_installs_only_the_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_moelb import plugin
    from sglang_moelb.ep import install

    installed: list[str] = []
    monkeypatch.setattr(install, "verified_findings", list)
    monkeypatch.setattr(install, "_install_hooks", lambda form, names: installed.extend(names))
    monkeypatch.delenv(CONFIG_VARIABLE, raising=False)
    plugin.register()
    assert installed == list(install.FLAG_SEAMS)
    monkeypatch.setenv(CONFIG_VARIABLE, "{}")
    plugin.register()
    others = installed[2 * len(install.FLAG_SEAMS) :]
    assert {"dispatch", "model-loaded", "state"} <= set(others)
    assert not set(others) & {*install.FLAG_SEAMS, *install.MAIN_SEAMS}


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "observe"},
        {"mode": "drop"},
        {"downgrade": {"ready": True}},
        {"replicate": {"ready": True}},
        {"verdict": {"enabled": True}},
    ],
    ids=str,
)
def test_nothing_that_acts_or_forecasts_goes_beside_a_resident_placement(
    changes: dict[str, Any],
) -> None:
    start = merge(Config(), {"resident": {"placement": "p.json"}})
    refuse_beside_resident(start)
    wanted = merge(start, changes)
    with pytest.raises(ConfigError, match=r"resident\.placement is set"):
        refuse_beside_resident(wanted)
    with pytest.raises(ConfigError):
        refuse_change(start, wanted)
    refuse_change(start, merge(start, {"capacity": {"factor": 1.1}}))
    refuse_beside_resident(merge(Config(), changes))


def test_replicas_move_only_from_a_placement_and_are_stopped_but_not_begun_while_serving() -> None:
    with pytest.raises(ConfigError, match=r"split is 'quota', but resident\.recalibrate is not"):
        refuse_beside_resident(merge(Config(), {"resident": {"split": "quota"}}))
    with pytest.raises(ConfigError, match=r"recalibrate is True, but resident\.placement is not"):
        refuse_beside_resident(merge(Config(), {"resident": {"recalibrate": True}}))
    still = merge(Config(), {"resident": {"placement": "p.json"}})
    moves = merge(still, {"resident": {"recalibrate": True}})
    refuse_beside_resident(moves)
    with pytest.raises(ConfigError, match=r"recalibrate is True: it decides about memory"):
        refuse_change(still, moves)
    refuse_change(moves, merge(moves, {"resident": {"move_ms": 0}}))
