"""Laws of the `--moelb-*` flags: none given, nothing done; a wrong one, one clear line."""

from __future__ import annotations

import argparse
import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang_moelb import config as configuration
from sglang_moelb.config import CONFIG_VARIABLE, Config, ConfigError, merge
from sglang_moelb.ep import flags, install, seams

LAUNCH_SERVER = "import runpy; runpy.run_module('sglang.launch_server', run_name='__main__')"
SGLANG = "from sglang.cli.main import main; main()"  # as the command does
HELPS = {
    "launch_server": [LAUNCH_SERVER, "--help"],
    "serve": [SGLANG, "serve", "--help"],
    "serve as moelb": [SGLANG, "serve", "--model-type", "moelb", "--help"],
}


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    flags.add_arguments(parser)
    return parser.parse_args(argv)


def config_of(*argv: str) -> Config | None:
    return flags.config_of(parse(*argv))


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `take_arguments` does to the process, instead of doing it."""
    seen: list[str] = []
    monkeypatch.delenv(CONFIG_VARIABLE, raising=False)
    monkeypatch.setattr(
        install, "refuse_unsupported_flags", lambda args: seen.append("checked SGLang's flags")
    )
    monkeypatch.setattr(install, "refuse_taken_port", lambda args: seen.append("tried the port"))
    monkeypatch.setattr(install, "install_in_main", lambda: seen.append("installed"))
    monkeypatch.setattr(
        configuration, "to_environment", lambda config, trace, tokens: seen.append(
            f"handed on {config.mode}" + (f", trace {trace}" if trace else "")
            + (f", tokens {tokens}" if tokens else "")
        )
    )
    return seen


def test_without_flags_there_is_no_configuration_and_nothing_is_done(done: list[str]) -> None:
    assert config_of() is None
    flags.take_arguments(parse())
    assert done == []
    flags.take_arguments(argparse.Namespace(model_path="x"))
    assert done == []


def test_with_a_flag_sglangs_are_checked_first_and_the_processes_are_told(done: list[str]) -> None:
    flags.take_arguments(parse("--moelb-mode", "drop"))
    assert done == ["checked SGLang's flags", "tried the port", "handed on drop", "installed"]
    flags.take_arguments(parse("--moelb-trace", "some/folder"))
    assert done[-2:] == ["handed on none, trace some/folder", "installed"]
    flags.take_arguments(parse("--moelb-trace", "some/folder", "--moelb-trace-tokens", "16"))
    assert done[-2:] == ["handed on none, trace some/folder, tokens 16", "installed"]
    flags.take_arguments(parse("--moelb-trace-tokens", "0"))
    assert done[-2:] == ["handed on none", "installed"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--moelb-trace-tokens", "4"), "--moelb-trace-tokens 4: needs a folder .* --moelb-trace"),
        (("--moelb-trace", "d", "--moelb-trace-tokens", "-1"), "--moelb-trace-tokens -1: use 0"),
    ],
)
def test_a_trace_of_tokens_that_cannot_be_is_refused_by_name(
    done: list[str], argv: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
        flags.take_arguments(parse(*argv))
    assert done == []


def test_any_one_flag_asks_for_the_plugin_in_mode_none() -> None:
    assert config_of("--moelb-config", "{}") == Config()
    assert config_of("--moelb-min-batch-tokens", "7") == merge(
        Config(), {"capacity": {"min_batch_tokens": 7}}
    )
    assert config_of("--moelb-mode", "none") == Config(mode="none")


def test_every_shortcut_sets_its_knob() -> None:
    values: dict[str, Any] = {
        "capacity.factor": 1.5,
        "capacity.level": "expert",
        "capacity.min_batch_tokens": 7,
        "controller.quality_budget": 0.125,
        "controller.min_gain": 0.25,
    }
    assert {knob for knob, _, _ in flags.SHORTCUTS.values()} == set(values)
    for name, (knob, _, _) in flags.SHORTCUTS.items():
        config = config_of("--" + name.replace("_", "-"), str(values[knob]))
        assert config is not None
        assert configuration.flat(config)[knob] == values[knob]
        assert configuration.flat(Config())[knob] != values[knob]


def test_flags_are_laid_over_the_configuration_and_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "moelb.json"
    path.write_text(json.dumps({"mode": "downgrade", "capacity": {"factor": 2, "level": "expert"}}))
    config = config_of(
        "--moelb-config", str(path), "--moelb-mode", "drop", "--moelb-capacity-factor", "1.5"
    )
    capacity = {"factor": 1.5, "level": "expert"}
    assert config == merge(Config(), {"mode": "drop", "capacity": capacity})


def test_the_help_names_every_knob_and_every_default() -> None:
    parser = argparse.ArgumentParser()
    flags.add_arguments(parser)
    text = " ".join(parser.format_help().split())
    for knob in configuration.knobs():
        assert knob in text
    for knob, _, _ in flags.SHORTCUTS.values():
        assert f"(knob {knob}, default {configuration.flat(Config())[knob]})" in text


WRONG: dict[str, tuple[list[str], list[str]]] = {
    "factor 0": (
        ["--moelb-capacity-factor", "0"],
        ["--moelb-capacity-factor 0.0", "capacity.factor is 0.0", ">= "],
    ),
    "factor negative": (["--moelb-capacity-factor", "-1"], ["--moelb-capacity-factor -1.0", ">= "]),
    "factor NaN": (["--moelb-capacity-factor", "nan"], ["is nan", "must be a finite number"]),
    "factor inf": (["--moelb-capacity-factor", "inf"], ["is inf", "must be a finite number"]),
    "level": (["--moelb-capacity-level", "host"], ["is 'host'", "use one of expert, device"]),
    "tokens negative": (["--moelb-min-batch-tokens", "-3"], ["--moelb-min-batch-tokens -3"]),
    "budget": (["--moelb-quality-budget", "1.5"], ["--moelb-quality-budget 1.5", "<= 1"]),
    "gain": (["--moelb-min-gain", "-0.1"], ["--moelb-min-gain -0.1", ">= 0"]),
    "unknown mode in the file": (
        ["--moelb-config", '{"mode": "fast"}'],
        ["mode is 'fast'", "use one of none, observe"],
    ),
    "missing file": (
        ["--moelb-config", "no/such/file.json"],
        ["--moelb-config no/such/file.json", "No such file", "Give a JSON file or JSON text"],
    ),
    "a folder": (["--moelb-config", "/"], ["--moelb-config /", "directory"]),
    "malformed": (["--moelb-config", '{"mode": '], ["--moelb-config: not valid JSON"]),
    "unknown knob": (
        ["--moelb-config", '{"capacity": {"fctor": 1}}'],
        ["unknown knob 'capacity.fctor'", "capacity.factor"],
    ),
    "unknown section": (["--moelb-config", '{"speed": 1}'], ["unknown knob 'speed'"]),
    "section no object": (
        ["--moelb-config", '{"controller": [1]}'],
        ["controller must be an object, found [1]"],
    ),
    "text for a number": (
        ["--moelb-config", '{"capacity": {"factor": "big"}}'],
        ["capacity.factor is 'big'", "Expected `float`"],
    ),
    "too large for the ranks": (
        ["--moelb-config", '{"capacity": {"factor": 1e300}}'],
        ["capacity.factor is 1e+300", "<= 1000"],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_ends_the_process_with_one_line_and_does_nothing(
    done: list[str], name: str
) -> None:
    argv, expected = WRONG[name]
    with pytest.raises(SystemExit) as ended:
        flags.take_arguments(parse(*argv))
    message = str(ended.value)
    assert message.startswith("sglang_moelb: ")
    assert "\n" not in message
    assert all(part in message for part in expected), message
    assert done == []


@pytest.mark.parametrize("text", [b"\xff\xfe\x00", b'["drop"]', b"3", b"", b'{"mode": "drop"'])
def test_a_file_that_is_no_json_object_is_named(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=rf"^--moelb-config {path}: "):
        config_of("--moelb-config", str(path))


@pytest.mark.parametrize(
    "argv",
    [
        ["--moelb-mode", "fast"],
        ["--moelb-capacity-factor", "much"],
        ["--moelb-min-batch-tokens", "1.5"],
    ],
)
def test_what_the_parser_itself_can_tell_it_refuses_with_the_flag(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(*argv)
    assert ended.value.code == 2
    assert f"argument {argv[0]}: invalid" in capsys.readouterr().err


GOOD_SERVER: dict[str, Any] = {
    "moe_a2a_backend": "deepep",
    "tp_size": 2,
    "deepep_mode": "normal",
    "disaggregation_mode": "null",
    "enable_two_batch_overlap": False,
    "enable_eplb": False,
    "init_expert_location": "trivial",
    "ep_num_redundant_experts": 0,
    "tokenizer_worker_num": 1,
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"moe_a2a_backend": "none"}, ["--moe-a2a-backend none", "use --moe-a2a-backend deepep"]),
        ({"moe_a2a_backend": "mooncake"}, ["--moe-a2a-backend mooncake"]),
        ({"tp_size": 1}, ["--tp-size 1", "use --tp-size 2 or more"]),
        ({"deepep_mode": "low_latency"}, ["--deepep-mode low_latency", "normal or auto"]),
        ({"deepep_mode": "auto"}, ["--deepep-mode auto", "use --deepep-mode normal, or add"]),
        ({"speculative_algorithm": "EAGLE"}, ["--speculative-algorithm EAGLE"]),
        ({"enable_pdmux": True}, ["--enable-pdmux", "leave the flag out"]),
        ({"enable_two_batch_overlap": True}, ["--enable-two-batch-overlap", "leave the flag out"]),
        ({"enable_eplb": True}, ["--enable-eplb", "leave the flag out"]),
        (
            {"init_expert_location": "counts.pt"},
            ["--init-expert-location counts.pt", "the router's scores", "leave the flag out"],
        ),
        ({"ep_num_redundant_experts": 2}, ["--ep-num-redundant-experts 2", "leave the flag out"]),
        ({"tokenizer_worker_num": 4}, ["--tokenizer-worker-num 4", "leave the flag out"]),
    ],
)
def test_flags_of_sglang_that_cannot_be_balanced_are_refused_by_name(
    changes: dict[str, Any], expected: list[str]
) -> None:
    install.refuse_unsupported_flags(argparse.Namespace(**GOOD_SERVER))
    with pytest.raises(SystemExit) as ended:
        install.refuse_unsupported_flags(argparse.Namespace(**{**GOOD_SERVER, **changes}))
    message = str(ended.value)
    assert "\n" not in message
    assert all(part in message for part in [*expected, "Or start without the --moelb flags"])


@pytest.mark.parametrize("eager", ["disable_cuda_graph", "disable_prefill_cuda_graph"])
def test_mode_auto_of_deepep_is_taken_where_prefill_has_no_graphs(eager: str) -> None:
    auto = {**GOOD_SERVER, "deepep_mode": "auto", eager: True}
    install.refuse_unsupported_flags(argparse.Namespace(**auto))


@pytest.mark.parametrize("switch", [{}, {"disable_prefill_cuda_graph": True}])
@pytest.mark.parametrize("backend", ["full", "disabled"])
def test_a_named_backend_of_prefill_graphs_wins_over_their_switch(
    backend: str, switch: dict[str, Any]
) -> None:
    named = {**GOOD_SERVER, "deepep_mode": "auto", "cuda_graph_backend_prefill": backend}
    args = argparse.Namespace(**named, **switch)
    if backend == "disabled":
        install.refuse_unsupported_flags(args)
    else:
        with pytest.raises(SystemExit, match="--deepep-mode auto: SGLang then captures prefill"):
            install.refuse_unsupported_flags(args)


def test_a_decode_role_may_run_low_latency() -> None:
    decode = {**GOOD_SERVER, "deepep_mode": "low_latency", "disaggregation_mode": "decode"}
    install.refuse_unsupported_flags(argparse.Namespace(**decode))


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_port_in_use_is_refused_by_name_before_a_weight_is_loaded(host: str) -> None:
    with socket.create_server((host, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit, match=f"--port {port}: cannot listen there.*another --port"):
            install.refuse_taken_port(argparse.Namespace(host=host, port=port, node_rank=0))
        install.refuse_taken_port(argparse.Namespace(host=host, port=port, node_rank=1))
    install.refuse_taken_port(argparse.Namespace(host=host, port=port, node_rank=0))


def test_each_help_of_sglang_has_the_flags_or_names_the_one_that_has(
    run_with_sglang: Callable[..., Any],
) -> None:
    texts = {}
    for name, command in HELPS.items():
        done = run_with_sglang(*command)
        assert done.returncode == 0, (name, done.stderr[-3000:])
        texts[name] = done.stdout
    options = ["--moelb-mode", "--moelb-config"]
    options += ["--" + name.replace("_", "-") for name in flags.SHORTCUTS]
    for name in ("launch_server", "serve as moelb"):
        assert all(option in texts[name] for option in options), name
    (override,) = [line for line in texts["serve"].splitlines() if "--model-type {" in line]
    assert "moelb" in override.partition("}")[0]
    # SGLang prints this help before it loads plugins; only its own source can add to it.
    patched = seams.form_of(install.verified_findings()) == "patch"
    assert all((option in texts["serve"]) == patched for option in options)


def test_the_backend_serves_with_what_it_was_given_and_does_not_serve_for_help(
    monkeypatch: pytest.MonkeyPatch, done: list[str]
) -> None:
    fakes: dict[str, dict[str, Any]] = {
        "sglang.launch_server": {"run_server": lambda args: done.append(f"served {args}")},
        "sglang.srt.plugins": {"load_plugins": lambda: done.append("plugins")},
        "sglang.srt.server_args": {"prepare_server_args": prepared},
    }
    for name, content in fakes.items():
        monkeypatch.setitem(sys.modules, name, argparse.Namespace(**content))  # type: ignore[arg-type]
    flags._serve(argparse.Namespace(argv=("--model-path", "m")))
    assert done == ["plugins", "served --model-path m"]
    flags._serve(argparse.Namespace(argv=("--model-path", "m", "-h")))
    assert done == ["plugins", "served --model-path m", "plugins"]


def prepared(argv: list[str]) -> str:
    """SGLang's function of that name, as far as this test goes."""
    if "--help" in argv:
        raise SystemExit(0)
    return " ".join(argv)
