"""Every table of docs/operations.md says what the code says."""

from __future__ import annotations

import argparse
import ast
import json
import re
from pathlib import Path
from types import ModuleType

from sglang_moelb.config import CHOICES, Config, flat
from sglang_moelb.ep import controller_link, flags, install, runtime, start
from sglang_moelb.ep.status import NUM_RECENT, Ledger
from sglang_moelb.metrics.table import METRICS
from sglang_moelb.types import MODES, Topology
from tests.controller.test_judge import OFF, ON

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """The text under a heading."""
    return re.split(r"^## ", PAGE.partition(f"## {title}\n")[2], flags=re.MULTILINE)[0]


def rows(title: str) -> dict[str, list[str]]:
    """Rows of the first table under a heading by their first cell, without backquotes."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")][2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].strip("`"): row[1:] for row in cells}


def test_every_knob_has_its_default_its_unit_and_its_choices() -> None:
    table = rows("Knobs")
    assert list(table) == list(flat(Config()))
    for knob, value in flat(Config()).items():
        default, unit, meaning = table[knob]
        assert json.loads(default.strip("`")) == value, knob
        assert unit, knob
        assert meaning, knob
        if knob in CHOICES:
            assert unit.split(", ") == list(CHOICES[knob]), knob


def test_every_flag_is_named() -> None:
    parser = argparse.ArgumentParser()
    flags.add_arguments(parser)
    text = section("Knobs")
    for action in parser._actions:
        for option in action.option_strings:
            if option.startswith("--moelb"):
                assert f"`{option}`" in text


def test_every_mode_is_there() -> None:
    assert set(rows("Modes")) == set(MODES)


def test_every_metric_that_is_named_is_one() -> None:
    named = set(re.findall(r"`(moelb_[a-z_]+)", PAGE)) - {"moelb_lossy"}
    assert named
    assert named <= {metric.name for metric in METRICS}


def fields_of_the_status(module: ModuleType) -> set[str]:
    """Keys of the largest dictionary in the function `status` of a module, and those set on it."""
    source = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    status = next(
        node
        for node in ast.walk(source)
        if isinstance(node, ast.FunctionDef) and node.name == "status"
    )
    dicts = [node for node in ast.walk(status) if isinstance(node, ast.Dict)]
    largest = max(dicts, key=lambda node: len(node.keys))
    names = {key.value for key in largest.keys if isinstance(key, ast.Constant)}
    names |= set(re.findall(r'answer\["(\w+)"\]', ast.unparse(status).replace("'", '"')))
    return {str(name) for name in names}


def test_every_field_of_the_status_is_there() -> None:
    names = fields_of_the_status(runtime) | fields_of_the_status(controller_link)
    assert set(rows("Status")) == names | {"ranks_answering"}
    assert f"the last {NUM_RECENT} passes" in section("Status")


def test_what_symptoms_point_at_exists() -> None:
    topology = Topology(num_layers=1, num_experts=4, num_ranks=2, topk=1)
    assert "num_passes_by_lever" in Ledger(topology).totals()
    known = set(re.findall(r'"(\w+)"', Path(install.__file__).with_name("status.py").read_text()))
    for field in (
        "gate_reason",
        "rows_after_R",
        "num_protected_tokens_R",
        "num_refused_tokens_R",
        "low_ranks",
        "balance_ms",
        "step_ms",
    ):
        assert field in known
        assert f"`{field}`" in section("It does not seem to work")


def test_every_flag_that_is_refused_at_start_is_there() -> None:
    text = section("Refused at start")
    for flag, _, _ in install._refusals(argparse.Namespace()):
        assert f"`{flag.split()[0]}" in text, flag
    assert install.SGLANG_VERSION in text
    families = {"Qwen3Moe": "Qwen3-MoE", "Qwen3VLMoe": "Qwen3-VL-MoE", "KimiVL": "Kimi-VL"}
    families |= {"DeepseekV2": "DeepSeek-V2", "DeepseekV3": "-V3"}
    for architecture in start.SUPPORTED:
        family = architecture.partition("For")[0]
        assert families[family] in text


def test_the_lines_of_the_verdict_are_worded_as_in_the_code() -> None:
    lines = [line for line in section("Should I turn it on?").splitlines() if ": verdict: " in line]
    few = f"not enough: 1 of 1 passes of at least {Config().capacity.min_batch_tokens} tokens"
    texts = [
        f"turn on {ON} (1 passes)",
        f"leave it off, because {OFF}min_gain 2.0 % (1 passes)",
        f"leave it off, because {few}",
    ]
    worded = [re.sub(r"-?\d+(\.\d)?", "0", f"sglang_moelb: verdict: {one}") for one in texts]
    assert [re.sub(r"-?\d+(\.\d)?", "0", line) for line in lines] == worded
