"""Find the facts on this machine. A thing that is not there is a fact, never an error.

Imports neither sglang nor torch: versions come from package metadata, seams from source text.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from importlib.util import find_spec
from pathlib import Path

from sglang_moelb import environment
from sglang_moelb.doctor.facts import (
    Facts,
    Gpu,
    Links,
    Package,
    PatchFact,
    PluginFact,
    SeamFact,
)
from sglang_moelb.doctor.parse import GPU_QUERY, cuda_of, gpus_of, matrix_of, peers_of
from sglang_moelb.ep import seams
from sglang_moelb.ep.install import SGLANG_VERSION
from sglang_moelb.patching import PatchError, status

OURS = "sglang-moelb"
PLUGIN_GROUP = "sglang.srt.plugins"
PLATFORM_GROUP = "sglang.srt.platforms"
PLUGINS = ("moelb", "moelb_standin")
TIMEOUT_S = 10.0
# label, then the distributions that may provide it, first found counts
PACKAGES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("sglang-moelb", (OURS,)),
    ("SGLang", ("sglang",)),
    ("torch", ("torch",)),
    ("transformers", ("transformers",)),
    ("DeepEP", ("sgl-deep-ep", "deep-ep")),
    ("DeepGEMM", ("sgl-deep-gemm", "deep-gemm")),
    ("SGLang kernels", ("sglang-kernel",)),
    ("flashinfer", ("flashinfer-python",)),
    ("triton", ("triton",)),
    ("prometheus-client", ("prometheus-client",)),
    (
        "KV transfer",
        (
            "mooncake-transfer-engine",
            "mooncake-transfer-engine-cuda13",
            "mooncake-transfer-engine-non-cuda",
            "nixl",
        ),
    ),
)
# import name, then what pip calls it: what `moelb ab` and the demo need beside the server
EXTRAS = (
    ("aiohttp", "aiohttp"),
    ("jinja2", "jinja2"),
    ("matplotlib", "matplotlib"),
    ("PIL", "pillow"),
    ("skimage", "scikit-image"),
    ("sklearn", "scikit-learn"),
)
_PIN = re.compile(r"([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?==([^\s;,]+)")


def probe() -> Facts:
    """All facts; seconds at most."""
    gpus, driver = _gpus()
    plugins, platform_name = environment.plugin_filters()
    return Facts(
        system=f"{platform.system()} {platform.machine()}",
        python=sys.version_info[:3],
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1,
        memory_mib=_memory_mib(),
        packages=tuple(_package(label, names) for label, names in PACKAGES),
        missing_extras=tuple(pip for name, pip in EXTRAS if find_spec(name) is None),
        seams=_seams(),
        patch=_patch(),
        plugins=tuple(_plugin(name, plugins, platform_name) for name in PLUGINS),
        sglang_plugins=plugins,
        sglang_platform=platform_name,
        driver=driver,
        gpus=gpus,
        links=_links() if len(gpus) > 1 else Links(),
    )


def _memory_mib() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") // 2**20
    except (ValueError, OSError):
        return 0


def _package(label: str, names: tuple[str, ...]) -> Package:
    pins = {"sglang": SGLANG_VERSION, **_pins()}
    expected = next((pins[name] for name in names if name in pins), "")
    for name in names:
        found = _version(name)
        if found:
            note = _torch_build() if name == "torch" else ""
            return Package(
                label=label, distribution=name, expected=expected, found=found, note=note
            )
    return Package(label=label, distribution=names[0], expected=expected, found="")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _pins() -> dict[str, str]:
    """Exact versions that the installed SGLang asks for."""
    try:
        wanted = requires("sglang") or []
    except PackageNotFoundError:
        return {}
    matches = (_PIN.match(line) for line in wanted)
    return {m[1].lower().replace("_", "-"): m[2] for m in matches if m}


def _torch_build() -> str:
    spec = find_spec("torch")
    folder = next(iter(spec.submodule_search_locations or []), "") if spec else ""
    path = Path(folder) / "version.py"
    cuda = cuda_of(path.read_text(encoding="utf-8")) if folder and path.is_file() else ""
    return f"built for CUDA {cuda}" if cuda else "CPU build"


def _seams() -> tuple[SeamFact, ...]:
    root = seams.sglang_root()
    if root is None:
        return ()
    return tuple(
        SeamFact(
            name=f.seam.name,
            form=f.form,
            problem=f.problem,
            expected=f.expected,
            found=f.found,
        )
        for f in seams.check(root)
    )


def _patch() -> PatchFact:
    try:
        return PatchFact(state=str(status().state))
    except PatchError as error:
        return PatchFact(state="unknown", error=str(error))


def _plugin(name: str, allowed: str, selected_platform: str) -> PluginFact:
    names = {word.strip() for word in allowed.split(",") if word.strip()}
    of_ours = [e for e in entry_points(group=PLATFORM_GROUP) if e.dist and e.dist.name == OURS]
    return PluginFact(
        name=name,
        found=bool(entry_points(group=PLUGIN_GROUP, name=name)),
        allowed=not allowed or name in names,
        platform_allows=not selected_platform
        or all(entry.name == selected_platform for entry in of_ours),
    )


def _gpus() -> tuple[tuple[Gpu, ...], str]:
    gpus, driver = gpus_of(_smi(f"--query-gpu={GPU_QUERY}", "--format=csv,noheader,nounits"))
    return (gpus, driver) if gpus else (_gpus_by_torch(), "")


def _gpus_by_torch() -> tuple[Gpu, ...]:
    """Where a device is there but nvidia-smi is not: ask torch, in a process of its own."""
    if not Path("/dev/nvidiactl").exists() or find_spec("torch") is None:
        return ()
    script = (
        "import torch\n"
        "for i in range(torch.cuda.device_count()):\n"
        "    p = torch.cuda.get_device_properties(i)\n"
        "    print(p.name, f'{p.major}.{p.minor}', p.total_memory >> 20, 'unknown', sep=',')\n"
    )
    return gpus_of(_output([sys.executable, "-c", script], timeout_s=3 * TIMEOUT_S))[0]


def _links() -> Links:
    return Links(
        kind_GG=matrix_of(_smi("topo", "-m")),
        peer_GG=peers_of(matrix_of(_smi("topo", "-p2p", "r"))),
    )


def _smi(*args: str) -> str:
    program = shutil.which("nvidia-smi")
    return _output([program, *args], timeout_s=TIMEOUT_S) if program else ""


def _output(command: list[str], *, timeout_s: float) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
