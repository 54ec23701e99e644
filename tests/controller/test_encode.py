"""Laws of the words that ranks agree on."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_moelb.controller.encode import FIELDS, NUM_WORDS, decode, encode
from sglang_moelb.types import Expansion, Level, Lever, Metric, Policy, Preference, Rule, Scope

micros = st.integers(0, 10**9).map(lambda n: n / 1_000_000)
policies = st.builds(
    Policy,
    epoch=st.integers(0, 2**62),
    lever=st.sampled_from(Lever),
    capacity_factor=micros,
    level=st.sampled_from(Level),
    scope=st.sampled_from(Scope),
    metric=st.sampled_from(Metric),
    preference=st.sampled_from(Preference),
    rule=st.sampled_from(Rule),
    expansion=st.sampled_from(Expansion),
    renormalise=st.booleans(),
    max_extra_experts=st.integers(0, 24),
    min_batch_tokens=st.integers(0, 2**40),
    macs_delta=micros,
    macs_rho=micros,
    min_copy_rows=st.integers(1, 2**20),
    send_rows=st.integers(0, 2**20),
    receive_rows=st.integers(0, 2**20),
    move=st.integers(0, 2**63 - 1),
    move_ms=micros,
    reason=st.text(),
)


def test_the_fields_that_travel_are_these() -> None:
    assert FIELDS == (
        "epoch",
        "lever",
        "capacity_factor",
        "level",
        "scope",
        "metric",
        "preference",
        "rule",
        "expansion",
        "renormalise",
        "max_extra_experts",
        "min_batch_tokens",
        "macs_delta",
        "macs_rho",
        "vision_share",
        "form",
        "min_copy_rows",
        "send_rows",
        "receive_rows",
        "move",
        "move_ms",
    )
    assert NUM_WORDS == 21 + 16, "the shares of 16 experts come last"


def test_every_field_of_a_policy_but_the_reason_travels() -> None:
    assert [*FIELDS, "split", "reason"] == [f.name for f in fields(Policy)]


@given(policies)
def test_a_policy_comes_back_from_its_words(policy: Policy) -> None:
    words = encode(policy)
    assert len(words) == NUM_WORDS
    assert all(type(w) is int and abs(w) < 2**63 for w in words)
    assert decode(words, policy.reason) == policy


def test_a_whole_number_given_for_a_factor_travels_as_one() -> None:
    assert encode(Policy(epoch=0, capacity_factor=2)) == encode(
        Policy(epoch=0, capacity_factor=2.0)
    )


def test_the_reason_does_not_travel() -> None:
    policy = Policy(epoch=3, lever=Lever.DROP, reason="here")
    assert encode(policy) == encode(replace(policy, reason="there"))
    assert decode(encode(policy), "there") == replace(policy, reason="there")


def test_words_of_another_version_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 37 words, found 36"):
        decode(encode(Policy(epoch=0))[:-1], "")
    with pytest.raises(ValueError, match="9 is not a valid Lever"):
        decode((0, 9, *encode(Policy(epoch=0))[2:]), "")
