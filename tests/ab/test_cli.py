from __future__ import annotations

import json
import socket
from pathlib import Path

import click
import pytest
import typer
from typer.testing import CliRunner

from sglang_moelb.ab import cli

app = typer.Typer()
app.command("ab")(cli.ab)


def moelb_ab(*arguments: str) -> tuple[int, str]:
    answer = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    return answer.exit_code, answer.output


@pytest.mark.usefixtures("fake_servers")
def test_the_command_runs_and_names_the_report(tmp_path: Path) -> None:
    common = ["--num-requests", "5", "--rounds", "1", "--max-tokens", "4", "--warmup", "2"]
    arms = ["--arm", "a=", "--arm", "b=--plugin"]
    place = ["--model", "fake", "--out", str(tmp_path), "--cpu"]
    code, output = moelb_ab(*common, *arms, *place, "--", "--shift", "0.5")
    assert code == 0, output
    assert str(tmp_path / "report.html") in output
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["conditions"]["common_flags"] == ["--shift", "0.5"]
    assert result["arms"][1]["agreement"][0]["distance_all"]["max"] == 0.0


@pytest.mark.usefixtures("fake_servers")
def test_an_arm_that_fails_gives_exit_code_1(tmp_path: Path) -> None:
    code, output = moelb_ab(
        *("--arm", "a=", "--arm", "b=--die-at-start", "--num-requests", "3", "--rounds", "1"),
        *("--model", "fake", "--out", str(tmp_path), "--cpu"),
    )
    assert code == 1
    assert "--die-at-start" in output


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--workload", "none.jsonl"), "none.jsonl: cannot be read"),
        (("--arm", "alone="), "needs two arms"),
        (("--order", "BA"), "--order BA"),
        (("stray",), "is not a flag"),
    ],
)
def test_bad_input_is_an_error_with_exit_code_2(arguments: tuple[str, ...], problem: str) -> None:
    code, output = moelb_ab("--cpu", "--model", "fake", *arguments)
    assert code == 2
    assert problem in output


def test_a_port_in_use_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        code, output = moelb_ab("--cpu", "--port", str(port), "--out", str(tmp_path / "x"))
    assert code == 2
    assert f"--port {port}" in output
    assert not (tmp_path / "x").exists()


def test_every_option_has_help() -> None:
    command = typer.main.get_command(app)
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
