"""A small copy of the installed SGLang: the files that the patches touch, as the wheel has them."""

from __future__ import annotations

import shutil
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest

from sglang_moelb.patching import revert
from sglang_moelb.patching.series import load_series, touched_paths
from sglang_moelb.patching.site import MANIFEST_NAME

from .trees import VERSION


@pytest.fixture(scope="session")
def installed() -> Distribution:
    """The SGLang of this environment, which may itself be patched."""
    return distribution("sglang")


@pytest.fixture(scope="session")
def wheel_files(installed: Distribution, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site with the touched files only, reverted if the installation is patched."""
    site = tmp_path_factory.mktemp("wheel")
    source = Path(str(installed.locate_file("")))
    info = f"sglang-{installed.version}.dist-info"
    names = ["sglang/__init__.py", f"{info}/METADATA", f"{info}/RECORD", f"sglang/{MANIFEST_NAME}"]
    for name in [*names, *touched_paths(load_series(VERSION))]:
        if (source / name).exists():
            (site / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, site / name)
    revert(site)
    return site


@pytest.fixture
def site(wheel_files: Path, tmp_path: Path) -> Path:
    """A pristine site of the test's own."""
    return Path(shutil.copytree(wheel_files, tmp_path / "site"))
