"""Laws of the CPU launcher: what a server process gets, and what is refused."""

from __future__ import annotations

import os
import sys

import pytest

from sglang_moelb.ep.standin import launch
from sglang_moelb.ep.standin.hooks import SITE
from sglang_moelb.ep.standin.launch import cpu_environment, cpu_server_args


def _value(flags: list[str], flag: str) -> str:
    return flags[flags.index(flag) + 1]


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_every_rank_has_a_core_that_this_process_may_use(num_ranks: int) -> None:
    cores = cpu_environment(num_ranks)["SGLANG_CPU_OMP_THREADS_BIND"].split("|")
    assert len(cores) == num_ranks
    assert {int(core) for core in cores} <= os.sched_getaffinity(0)


def test_a_pythonpath_of_the_user_stays_behind_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/mine")
    assert cpu_environment(2)["PYTHONPATH"] == f"{SITE}{os.pathsep}/mine"
    monkeypatch.delenv("PYTHONPATH")
    assert cpu_environment(2)["PYTHONPATH"] == str(SITE)


def test_other_plugins_are_not_excluded() -> None:
    assert "SGLANG_PLUGINS" not in cpu_environment(2)


def test_deepep_and_attention_dp_are_flags_of_their_own() -> None:
    both = cpu_server_args(4, "deepep", attention_dp=True)
    assert _value(both, "--moe-a2a-backend") == "deepep"
    assert _value(both, "--attn-dp-size") == _value(both, "--ep-size") == "4"
    neither = cpu_server_args(4, "none", attention_dp=False)
    assert not {"--moe-a2a-backend", "--attn-dp-size"} & set(neither)


@pytest.mark.parametrize("num_ranks", [0, 1, 3, 16])
def test_a_number_of_ranks_without_kernels_is_refused(num_ranks: int) -> None:
    with pytest.raises(ValueError, match=f"ranks={num_ranks}"):
        cpu_server_args(num_ranks)


def test_an_unknown_all_to_all_is_refused() -> None:
    with pytest.raises(ValueError, match="a2a='mori'"):
        cpu_server_args(2, "mori")


def test_the_program_becomes_a_server_with_the_users_flags_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(os, "execv", lambda path, command: calls.append((path, command)))
    monkeypatch.setattr(os, "environ", {})
    launch.main(["--ranks", "4", "--tp-attention", "--", "--model-path", "m", "--port", "1"])
    ((path, command),) = calls
    assert path == sys.executable
    assert command[1:3] == ["-m", "sglang.launch_server"]
    assert command[-4:] == ["--model-path", "m", "--port", "1"]
    assert _value(command, "--tp-size") == "4"
    assert "--attn-dp-size" not in command


def test_the_program_refuses_three_ranks_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        launch.main(["--ranks", "3"])
    assert "ranks=3: use one of (2, 4, 8)" in capsys.readouterr().err
