"""Laws of the seams: the table, the hooks, the patches and the installed SGLang say the same."""

from __future__ import annotations

import inspect
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_moelb.ep import hooks, install, passed, points, seams
from sglang_moelb.ep.seams import SEAMS, Seam, check, form_of
from sglang_moelb.patching.series import load_series

SERIES = load_series(install.SGLANG_VERSION)
ROOT = seams.sglang_root()
CALL = re.compile(r"moelb_points\.(\w+)\(")
BY_NAME = {seam.name: seam for seam in SEAMS}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A `sglang` folder with the files that the seams are in."""
    assert ROOT is not None
    for seam in SEAMS:
        target = path_of(tmp_path / "sglang", seam)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path_of(ROOT, seam), target)
    return tmp_path / "sglang"


def path_of(root: Path, seam: Seam) -> Path:
    return root.joinpath(*seam.module.split(".")[1:]).with_suffix(".py")


def edit(root: Path, seam: Seam, change: Callable[[str], str]) -> None:
    path = path_of(root, seam)
    before = path.read_text(encoding="utf-8")
    after = change(before)
    assert after != before
    path.write_text(after, encoding="utf-8")


def definition(seam: Seam) -> re.Pattern[str]:
    return re.compile(rf"^( *)(async )?def {seam.symbol.split('.')[-1]}\(", re.MULTILINE)


def test_every_row_resolves_against_the_installed_sglang() -> None:
    assert ROOT is not None
    findings = check(ROOT)
    assert [f.seam.name for f in findings] == [s.name for s in SEAMS]
    assert [f.problem for f in findings] == [""] * len(SEAMS)
    assert form_of(findings) in ("hook", "patch")


def test_names_points_and_targets_are_unique() -> None:
    for values in (
        [s.name for s in SEAMS],
        [s.point for s in SEAMS],
        [s.target for s in SEAMS],
    ):
        assert len(set(values)) == len(values)
    assert all(s.why and s.until and s.params for s in SEAMS)


def test_every_point_is_in_the_table_and_every_row_has_its_point() -> None:
    helpers = {"attached", "attach", "detach"}
    functions = {
        name
        for name, value in inspect.getmembers(points, inspect.isfunction)
        if value.__module__ == points.__name__ and not name.startswith("_")
    }
    assert functions - helpers == {s.point for s in SEAMS}
    for seam in SEAMS:
        doc = inspect.getdoc(getattr(points, seam.point)) or ""
        assert doc.startswith(f"Seam `{seam.name}`: ")


def test_every_seam_has_a_hook_and_every_hook_a_seam() -> None:
    assert set(hooks.HOOKS) == set(BY_NAME)
    for name, (kind, hook) in hooks.HOOKS.items():
        assert kind in ("BEFORE", "AFTER", "AROUND")
        assert f"points.{BY_NAME[name].point}(" in inspect.getsource(hook)


@pytest.mark.parametrize("seam", SEAMS, ids=lambda s: s.name)
def test_a_hook_can_be_called_with_the_parameters_of_its_seam(seam: Seam) -> None:
    kind, hook = hooks.HOOKS[seam.name]
    arguments = list(seam.params)
    if seam.name == "flags":  # a static method
        assert arguments == ["parser"]
    given = [*{"AFTER": ["result"], "AROUND": ["original"]}.get(kind, []), *arguments]
    inspect.signature(hook).bind(*given)


def test_experts_run_in_sglang_to_the_bit_unless_the_lever_runs_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, hook = hooks.HOOKS["experts"]
    layer, rows, stock, ours = object(), object(), object(), object()

    def original(*args: object) -> object:
        assert args == (layer, rows)
        return stock

    assert hook(original, layer, dispatch_output=rows) is stock
    monkeypatch.setattr(points, "run_experts", lambda *args: ours if args == (layer, rows) else 0)
    assert hook(original, layer, rows) is ours


def test_the_table_names_exactly_the_patches_that_call_us() -> None:
    calling = {
        patch.name: sorted(CALL.findall(added_text(patch.text))) for patch in SERIES
    }
    calling = {name: calls for name, calls in calling.items() if calls}
    table: dict[str, set[str]] = {}
    for seam in SEAMS:
        table.setdefault(seam.patch, set()).add(seam.point)
    assert {name: set(calls) for name, calls in calling.items()} == table
    for patch in SERIES:
        if patch.name in table:
            listed = [word.strip() for word in patch.header["Calls"].split(",")]
            assert set(listed) == table[patch.name]


def added_text(text: str) -> str:
    lines = text.splitlines()
    return "\n".join(x for x in lines if x.startswith("+") and not x.startswith("+++"))


@pytest.mark.parametrize("seam", SEAMS, ids=lambda s: s.name)
def test_a_renamed_function_is_found(copy: Path, seam: Seam) -> None:
    last = seam.symbol.split(".")[-1]
    edit(copy, seam, lambda t: definition(seam).sub(rf"\1\2def {last}_renamed(", t))
    (finding,) = check(copy, [seam])
    assert (finding.problem, finding.found) == ("no such function", "nothing")
    assert finding.expected == f"{seam.symbol}({', '.join(seam.params)})"


@pytest.mark.parametrize("seam", SEAMS, ids=lambda s: s.name)
def test_other_parameters_are_found(copy: Path, seam: Seam) -> None:
    last = seam.symbol.split(".")[-1]
    edit(copy, seam, lambda t: definition(seam).sub(rf"\1\2def {last}(one_more, ", t))
    (finding,) = check(copy, [seam])
    assert finding.problem == "other parameters"
    assert "one_more" in finding.found
    assert "one_more" not in finding.expected


def test_a_missing_module_and_one_that_is_no_python_are_found(copy: Path) -> None:
    seam = BY_NAME["dispatch"]
    path_of(copy, seam).write_text("def broken(:\n")
    (finding,) = check(copy, [seam])
    assert finding.problem == "not Python"
    path_of(copy, seam).unlink()
    (finding,) = check(copy, [seam])
    assert (finding.problem, finding.expected) == ("no such module", seam.module)


def make_half_patched(copy: Path, seam: Seam) -> None:
    """Turn one seam into the other form."""
    if form_of(check(copy)) == "patch":
        edit(copy, seam, lambda t: t.replace(f"moelb_points.{seam.point}(", "len("))
    else:
        line = "\n    def experts_are_next(self):\n        moelb_points.run_experts(self)\n"
        body = r"(def run_moe_core\(self, [^\n]*\n)"
        edit(copy, seam, lambda t: re.sub(body, r"\1" + line.split("\n")[2] + "\n", t))


def test_a_tree_that_is_patched_in_part_has_no_form(copy: Path) -> None:
    make_half_patched(copy, BY_NAME["experts"])
    assert form_of(check(copy)) is None


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (
            lambda root: edit(
                root, BY_NAME["dispatch"], lambda t: t.replace("def dispatch_a(", "def dispatch_z(")
            ),
            ["not what it must be", "dispatch: no such function", "expected DeepEPDispatcher"],
        ),
        (
            lambda root: edit(
                root,
                BY_NAME["experts"],
                lambda t: t.replace("def run_moe_core(self, ", "def run_moe_core(self, extra, "),
            ),
            ["experts: other parameters", "expected FusedMoE.run_moe_core(self, dispatch_output)"],
        ),
        (lambda root: path_of(root, BY_NAME["http"]).unlink(), ["http: no such module"]),
        (
            lambda root: make_half_patched(root, BY_NAME["experts"]),
            ["patched in part", "moelb patch revert", "moelb patch apply"],
        ),
    ],
    ids=["renamed", "parameters", "missing", "half-patched"],
)
def test_a_mutilated_sglang_ends_the_process_with_expected_and_found(
    copy: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Path], None],
    expected: list[str],
) -> None:
    monkeypatch.setattr(seams, "sglang_root", lambda: copy)
    monkeypatch.setattr(
        install, "_install_hooks", lambda *a: pytest.fail("installed before the check")
    )
    spoil(copy)
    with pytest.raises(SystemExit) as ended:
        install.install()
    message = str(ended.value)
    assert message.startswith("sglang_moelb: ")
    assert all(part in message for part in expected), message
    if "patched in part" not in message:
        assert "found    " in message


def test_another_version_ends_the_process_with_both_versions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(install, "version", lambda name: "0.5.99")
    with pytest.raises(SystemExit, match=r"expected SGLang 0\.5\.23, found 0\.5\.99"):
        install.install()


def test_a_seam_that_no_prefill_passed_ends_the_process_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(passed, "num_passed", type(passed.num_passed)())
    prefill = [s for s in SEAMS if s.moment == "prefill"]
    assert {s.name for s in prefill} >= {"dispatch", "experts", "combine", "begin-pass", "end-pass"}
    for seam in prefill:
        passed.num_passed[seam.name] = 1
    passed.verify_passed()
    for seam in prefill:
        passed.num_passed[seam.name] = 0
        with pytest.raises(SystemExit, match=re.escape(f"  {seam.name}: {seam.target}")):
            passed.verify_passed()
        passed.num_passed[seam.name] = 1


def test_points_do_nothing_while_no_runtime_is_attached() -> None:
    assert points.attached() is None
    output, rows = object(), object()
    assert points.before_dispatch(None, None, output) is output
    assert points.run_experts(None, rows) is None
    state: dict[str, object] = {}
    points.add_internal_state(state)
    for point in (points.new_batch, points.begin_pass):
        point(None, None)
    for point in (points.end_pass, points.after_experts, points.after_combine):
        point(None)
    points.take_internal_state(None)
    assert state == {}
    assert not passed.num_passed


@pytest.mark.parametrize("ids", [[], ()])
def test_a_prompt_without_tokens_is_refused_and_any_other_is_not(ids: list[int]) -> None:
    with pytest.raises(ValueError, match="the prompt has no tokens; send a text, or input_ids"):
        points.check_request(SimpleNamespace(input_embeds=None), ids)
    points.check_request(SimpleNamespace(input_embeds=[[0.5]]), ids)
    points.check_request(SimpleNamespace(input_embeds=None), None)
    points.check_request(SimpleNamespace(input_embeds=None), [0])


@pytest.mark.parametrize("value", ["false", 0, None, []])
def test_a_refusal_that_is_not_a_boolean_is_refused_itself(value: Any) -> None:
    def ask(custom_params: Any) -> None:
        sampling = {"custom_params": custom_params}
        points.check_request(SimpleNamespace(input_embeds=None, sampling_params=sampling), [0])

    with pytest.raises(ValueError, match="use false to refuse"):
        ask({"moelb_lossy": value})
    for right in ({"moelb_lossy": False}, {"moelb_lossy": True}, {"other": value}, {}, None):
        ask(right)


def test_a_row_describes_its_call_and_its_target() -> None:
    seam = replace(SEAMS[0], module="sglang.a", symbol="B.c", point="d")
    assert (seam.target, seam.call) == ("sglang.a.B.c", "moelb_points.d(")
