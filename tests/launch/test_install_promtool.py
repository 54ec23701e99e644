"""`scripts/install_promtool.sh` on machines of every kind, with stand-ins for apt and dpkg."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "install_promtool.sh"
TOOLS = ("bash", "mktemp", "mkdir", "rm", "mv", "ln", "tar", "tail", "timeout", "cat", "chmod")
APT_GET = """#!/bin/bash
echo "$*" >> {calls}
case $* in
  *update*) ;;
  *State::Lists*download*) [[ {works} != never ]] && : > prometheus_1_amd64.deb ;;
  *download*) [[ {works} == at-once ]] && : > prometheus_1_amd64.deb ;;
esac || {{ echo "E: Unable to locate package prometheus"; exit 100; }}
"""
DPKG_DEB = """#!/bin/bash
mkdir -p {folder}/usr/bin
printf '#!/bin/bash\\necho promtool, version 1\\n' > {folder}/usr/bin/promtool
chmod +x {folder}/usr/bin/promtool
tar -c -C {folder} ./usr/bin/promtool
"""


class Machine:
    """A PATH with nothing but what is put there."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.target = folder / "venv-bin"
        self.calls = folder / "calls"
        self._package = folder / "package"
        for made in (self.bin, self.target):
            made.mkdir()
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found, tool
            (self.bin / tool).symlink_to(found)

    def put(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def put_apt(self, works: str) -> None:
        self.put("apt-get", APT_GET.format(calls=self.calls, works=works))
        self.put("dpkg-deb", DPKG_DEB.format(folder=self._package))

    def install(self) -> tuple[int, str]:
        done = subprocess.run(
            ["bash", str(SCRIPT), str(self.target)],
            env={"PATH": str(self.bin), "TMPDIR": str(self.bin.parent)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert not list(self.bin.parent.glob("tmp.*")), "nothing is left behind"
        return done.returncode, done.stderr

    def num_calls(self) -> int:
        return len(self.calls.read_text().splitlines()) if self.calls.exists() else 0


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize(("works", "num_calls"), [("at-once", 1), ("with-own-lists", 3)])
def test_it_is_unpacked_from_debians_package_and_once_only(
    machine: Machine, works: str, num_calls: int
) -> None:
    machine.put_apt(works)
    assert machine.install() == (0, "")
    assert machine.num_calls() == num_calls
    said = subprocess.run([machine.target / "promtool"], capture_output=True, check=True)
    assert said.stdout == b"promtool, version 1\n"
    assert machine.install() == (0, "")
    assert machine.num_calls() == num_calls


def test_one_that_is_there_is_linked_and_nothing_is_fetched(machine: Machine) -> None:
    machine.put_apt("at-once")
    machine.put("promtool", "#!/bin/bash\n")
    assert machine.install() == (0, "")
    assert (machine.target / "promtool").resolve() == machine.bin / "promtool"
    assert machine.num_calls() == 0


def test_without_apt_it_says_what_is_missing(machine: Machine) -> None:
    code, said = machine.install()
    assert code == 1
    assert "promtool is not available: there is no apt-get" in said


def test_a_package_that_cannot_be_had_is_told_with_apts_own_words(machine: Machine) -> None:
    machine.put_apt("never")
    code, said = machine.install()
    assert code == 1
    assert "cannot fetch package prometheus (E: Unable to locate package prometheus)" in said
    assert not (machine.target / "promtool").exists()
