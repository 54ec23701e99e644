from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ab.support import make_plan
from sglang_moelb.ab.arms import parse_arms, server_command, session_order
from sglang_moelb.ab.types import AbError, Arm


def test_the_default_arms_are_stock_and_auto() -> None:
    stock, auto = parse_arms([], [])
    assert stock == Arm(name="stock")
    assert auto == Arm(name="auto", flags=("--moelb-mode", "auto"))


def test_flags_are_split_as_a_shell_does() -> None:
    arms = parse_arms(["a=", """b=--moelb-config '{"mode": "drop"}' --x=1"""], [])
    assert arms[1].flags == ("--moelb-config", '{"mode": "drop"}', "--x=1")


def test_urls_alone_are_arms_and_an_arm_may_have_a_url() -> None:
    arms = parse_arms([], ["a=http://host:1/", "b=https://host"])
    assert [arm.url for arm in arms] == ["http://host:1", "https://host"]
    both = parse_arms(["a=--x", "b="], ["a=http://host:1"])
    assert both == (Arm(name="a", flags=("--x",), url="http://host:1"), Arm(name="b"))


@pytest.mark.parametrize(
    ("arms", "urls", "problem"),
    [
        (["stock"], [], "must be NAME=VALUE"),
        (["a b=", "c="], [], "must be NAME=VALUE"),
        (["../x=", "c="], [], "must be NAME=VALUE"),
        (["a=", "a=--x"], [], "given 2 times"),
        (["a="], [], "needs two arms"),
        (["a=", "b=oops"], [], "is not a flag"),
        (["a=", "b=--x 'y"], [], "cannot be split"),
        (["a="], ["b=host:1"], "not an address"),
    ],
)
def test_a_wrong_arm_is_named(arms: list[str], urls: list[str], problem: str) -> None:
    with pytest.raises(AbError, match=problem):
        parse_arms(arms, urls)


def test_abba_goes_forth_and_back() -> None:
    arms = parse_arms(["a=", "b="], [])
    assert session_order(arms, "AB") == ("a", "b")
    assert session_order(arms, "ABBA") == ("a", "b", "b", "a")
    with pytest.raises(AbError, match="--order BA"):
        session_order(arms, "BA")


def test_an_arms_flags_come_last_so_that_they_win(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, "a=", "b=--seed 2", common_flags=("--seed", "1"))
    command = server_command(plan, plan.arms[1], 4000)
    assert command[-4:] == ["--seed", "1", "--seed", "2"]
    assert command[command.index("--port") + 1] == "4000"


def test_a_stock_arm_gets_no_flag_of_ours(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, "stock=", "auto=--moelb-mode auto")
    assert not any("moelb" in flag for flag in server_command(plan, plan.arms[0], 1)[3:])
    assert "--moelb-mode" in server_command(plan, plan.arms[1], 1)


def test_a_server_on_cpu_starts_through_the_stand_in_and_on_gpu_directly(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, "a=", "b=")
    assert server_command(plan, plan.arms[0], 1)[2] == "sglang_moelb.ep.standin.launch"
    on_gpu = dataclasses.replace(plan, cpu=False)
    assert server_command(on_gpu, plan.arms[0], 1)[2] == "sglang.launch_server"


def test_the_prefix_cache_is_off_unless_kept_and_a_parser_of_the_user_is_kept(
    tmp_path: Path,
) -> None:
    plan = make_plan(tmp_path, "a=", "b=", common_flags=())
    command = server_command(plan, plan.arms[0], 1)
    assert "--disable-radix-cache" in command
    assert "qwen25" in command
    kept = dataclasses.replace(plan, prefix_cache=True, common_flags=("--reasoning-parser=x",))
    command = server_command(kept, plan.arms[0], 1)
    assert "--disable-radix-cache" not in command
    assert "qwen25" not in command
