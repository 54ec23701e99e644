"""The patch files: headers, size, fit to the wheel, and agreement with our functions and pins."""

from __future__ import annotations

import ast
import compileall
import re
import shutil
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from sglang_moelb.ep import points
from sglang_moelb.patching import PatchError, State, apply, revert, status
from sglang_moelb.patching.series import (
    FIELDS,
    REMOVED_LINES,
    Patch,
    apply_patches,
    known_versions,
    load_series,
    parse_patch,
    patches_root,
    touched_paths,
)

from .trees import VERSION, record_hash, tree_hash

SERIES = load_series(VERSION)
PATHS = touched_paths(SERIES)
PATCHES = pytest.mark.parametrize("patch", SERIES, ids=[patch.name for patch in SERIES])
CALL = "moelb_points."
IMPORT = "from sglang_moelb.ep import points as moelb_points"
# Patches that need more than ten added lines; this list may only shrink.
LONGER = {"add-recorder-scope-to-qwen3-vl-moe.patch": 30}


def added_lines(patch: Patch) -> list[str]:
    lines = patch.text.partition("\n\n")[2].splitlines()
    return [line[1:] for line in lines if line.startswith("+") and not line.startswith("+++ ")]


@PATCHES
def test_a_header_has_its_five_fields_in_order(patch: Patch) -> None:
    expected = [*FIELDS, REMOVED_LINES] if patch.num_removed else [*FIELDS]
    assert list(patch.header) == expected


@PATCHES
def test_a_name_is_a_verb_and_an_object_in_kebab_case(patch: Patch) -> None:
    assert re.fullmatch(r"(add|call|record|scatter)(-[a-z0-9]+)+\.patch", patch.name)


@PATCHES
def test_a_description_is_one_sentence(patch: Patch) -> None:
    assert re.fullmatch(r"[A-Z][^\n]+[^.]\.", patch.header["Description"])


@PATCHES
def test_upstream_is_a_link_or_to_submit_or_ours_only_with_a_reason(patch: Patch) -> None:
    form = r"https://github\.com/sgl-project/sglang/\S+|to-submit(, .+)?|ours-only, because .+"
    assert re.fullmatch(form, patch.header["Upstream"])


@PATCHES
def test_a_patch_calls_exactly_the_functions_its_header_names(patch: Patch) -> None:
    called = set(re.findall(r"\bmoelb_points\.(\w+)\(", "\n".join(added_lines(patch))))
    named = patch.header["Calls"]
    assert called == (set() if named == "nothing of ours" else set(named.split(", ")))
    assert all(callable(getattr(points, name, None)) for name in called)


@PATCHES
def test_only_a_patch_that_calls_us_imports_us_once_a_file(patch: Patch) -> None:
    lines = [line for line in added_lines(patch) if "sglang_moelb" in line]
    num_files = len(patch.changes) if patch.header["Calls"] != "nothing of ours" else 0
    assert lines == [IMPORT] * num_files


@PATCHES
def test_a_patch_is_short(patch: Patch) -> None:
    assert patch.num_added <= LONGER.get(patch.name, 10)


def test_the_long_patches_are_as_long_as_listed() -> None:
    assert {p.name: p.num_added for p in SERIES if p.num_added > 10} == LONGER


def test_series_lists_every_patch_once() -> None:
    folder = patches_root().joinpath(f"sglang-{VERSION}")
    found = sorted(entry.name for entry in folder.iterdir() if entry.name != "series")
    assert sorted(patch.name for patch in SERIES) == found


def test_there_is_a_series_for_the_installed_sglang(installed: Distribution) -> None:
    assert installed.version in known_versions()


def test_the_readme_lists_the_patches_as_their_headers_have_them() -> None:
    readme = Path(__file__).parents[2].joinpath("patches", "README.md").read_text()
    rows = [
        f"| {number} | `{patch.name.removesuffix('.patch')}` | {patch.header['Description']} |"
        for number, patch in enumerate(SERIES, start=1)
    ]
    found = [line for line in readme.splitlines() if re.match(r"\| \d", line)]
    assert found == rows


def test_the_copy_is_what_the_wheel_recorded(site: Path, installed: Distribution) -> None:
    hashes = {str(f): f.hash.value for f in installed.files or [] if f.hash is not None}
    for path in PATHS:
        assert record_hash((site / path).read_bytes()) == hashes[path]


def test_apply_and_revert_give_the_same_tree(site: Path) -> None:
    (site / PATHS[0]).chmod(0o664)
    before = tree_hash(site)
    assert apply(site).state is State.APPLIED
    assert tree_hash(site) != before
    assert (site / PATHS[0]).stat().st_mode & 0o777 == 0o664
    assert revert(site).state is State.PRISTINE
    assert tree_hash(site) == before


def test_apply_twice_is_apply_once(site: Path) -> None:
    apply(site)
    once = tree_hash(site)
    apply(site)
    assert tree_hash(site) == once


def test_reverting_a_pristine_tree_changes_nothing(site: Path) -> None:
    before = tree_hash(site)
    assert revert(site).state is State.PRISTINE
    assert tree_hash(site) == before


def test_patched_files_compile(site: Path) -> None:
    apply(site)
    assert compileall.compile_dir(site / "sglang", quiet=1)


def test_every_call_stands_in_the_patched_source(site: Path) -> None:
    apply(site)
    calls = [
        node.func.attr
        for path in PATHS
        for node in ast.walk(ast.parse((site / path).read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "moelb_points"
    ]
    named = [
        name for p in SERIES for name in p.header["Calls"].split(", ") if "nothing" not in name
    ]
    assert sorted(set(calls)) == sorted(named)


def test_another_version_is_refused_with_both_named(site: Path) -> None:
    info = site / f"sglang-{VERSION}.dist-info"
    metadata = info / "METADATA"
    metadata.write_text(
        metadata.read_text().replace(f"\nVersion: {VERSION}\n", "\nVersion: 0.5.24\n")
    )
    info.rename(site / "sglang-0.5.24.dist-info")
    before = tree_hash(site)
    for operation in (apply, revert, status):
        with pytest.raises(PatchError, match=rf"0\.5\.24.*{re.escape(VERSION)}"):
            operation(site)
    assert tree_hash(site) == before


def test_a_modified_file_is_refused_by_name(site: Path) -> None:
    path = site / PATHS[3]
    path.write_text(path.read_text() + "# mine\n")
    before = tree_hash(site)
    assert status(site).state is State.MODIFIED
    for operation in (apply, revert):
        with pytest.raises(PatchError, match=re.escape(PATHS[3])):
            operation(site)
    assert tree_hash(site) == before


def test_a_file_modified_after_apply_is_refused_by_name(site: Path) -> None:
    apply(site)
    path = site / PATHS[3]
    path.write_text(path.read_text() + "# mine\n")
    before = tree_hash(site)
    for operation in (apply, revert):
        with pytest.raises(PatchError, match=re.escape(PATHS[3])):
            operation(site)
    assert tree_hash(site) == before


def test_a_missing_file_is_refused_by_name(site: Path) -> None:
    (site / PATHS[0]).unlink()
    with pytest.raises(PatchError, match=re.escape(PATHS[0])):
        apply(site)


def test_a_half_applied_tree_is_refused_and_revert_completes_it(
    site: Path, wheel_files: Path
) -> None:
    before = tree_hash(site)
    apply(site)
    shutil.copy2(wheel_files / PATHS[0], site / PATHS[0])
    assert status(site).state is State.HALF_APPLIED
    with pytest.raises(PatchError, match=f"half-applied.*{re.escape(PATHS[1])}"):
        apply(site)
    assert revert(site).state is State.PRISTINE
    assert tree_hash(site) == before


def test_patched_files_without_a_manifest_are_half_applied(site: Path) -> None:
    apply(site)
    (site / "sglang" / ".moelb-patched.json").unlink()
    with pytest.raises(PatchError, match="half-applied"):
        apply(site)
    assert revert(site).state is State.PRISTINE


def test_a_write_that_fails_midway_leaves_the_tree_as_it_was(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree_hash(site)
    replace = Path.replace

    def fail_at_fourth(self: Path, target: Path) -> Path:
        if target == site / PATHS[3] and self.name.startswith(".moelb-new-"):
            raise PermissionError(13, "Permission denied", str(target))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail_at_fourth)
    with pytest.raises(PatchError, match=f"{re.escape(PATHS[3])}.*nothing was changed"):
        apply(site)
    assert tree_hash(site) == before


def test_a_release_with_other_patches_can_still_revert(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree_hash(site)
    apply(site)
    monkeypatch.setattr("sglang_moelb.patching.operations.load_series", lambda version: SERIES[:-1])
    assert status(site).state is State.OUTDATED
    with pytest.raises(PatchError, match="another set of patches"):
        apply(site)
    assert revert(site).state is State.PRISTINE
    assert tree_hash(site) == before


def test_reverting_drops_only_what_the_patched_source_compiled_to(site: Path) -> None:
    compileall.compile_dir(site / "sglang", quiet=1)
    before = tree_hash(site)
    apply(site)
    revert(site)
    assert tree_hash(site) == before
    apply(site)
    compileall.compile_file(site / PATHS[0], quiet=1)
    revert(site)
    stem = Path(PATHS[0]).stem
    assert not list((site / PATHS[0]).parent.glob(f"__pycache__/{stem}.*.pyc"))
    assert list((site / PATHS[1]).parent.glob("__pycache__/*.pyc"))


def test_a_hunk_that_fits_one_line_further_is_refused(site: Path) -> None:
    path = site / PATHS[0]
    with pytest.raises(PatchError, match="line"):
        apply_patches("\n" + path.read_text(), PATHS[0], SERIES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Description: x.\n--- a/f\n", "no empty line"),
        ("Description\n\n--- a/f\n", "header line"),
        ("Description: x.\nDescription: y.\n\n--- a/f\n", "once each"),
        ("Description: x.\n\n--- a/f\n+++ b/g\n@@ -1 +1 @@\n-a\n+b\n", "expected"),
        ("Description: x.\n\n--- a/../f\n+++ b/../f\n@@ -1 +1 @@\n-a\n+b\n", "expected"),
        ("Description: x.\n\n--- a/f\n+++ b/f\n", "no hunk"),
        ("Description: x.\n\n--- a/f\n+++ b/f\n@@ -1,2 +1 @@\n-a\n+b\n", "end of file"),
        ("Description: x.\n\n--- a/f\n+++ b/f\n@@ -1 +1 @@\n-a\n+b", "no newline"),
    ],
)
def test_a_malformed_patch_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(PatchError, match=f"mine.patch: .*{message}"):
        parse_patch("mine.patch", text)
