"""Made-up machines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sglang_moelb.doctor.facts import (
    Facts,
    Gpu,
    Links,
    Mark,
    Package,
    PatchFact,
    PluginFact,
    Report,
    Row,
    SeamFact,
)
from sglang_moelb.doctor.probe import PACKAGES

H100 = Gpu(name="NVIDIA H100 80GB HBM3", capability=(9, 0), memory_mib=81559)
A100 = Gpu(name="NVIDIA A100-SXM4-80GB", capability=(8, 0), memory_mib=81920)
VERSIONS = {"SGLang": "0.5.23", "torch": "2.14.1"}
GPU_LABELS = ("DeepEP", "DeepGEMM", "SGLang kernels", "flashinfer", "KV transfer")


def package(label: str, found: str, note: str = "") -> Package:
    return Package(
        label=label,
        distribution=dict(PACKAGES)[label][0],
        expected=VERSIONS.get(label, ""),
        found=found,
        note=note,
    )


def version_of(label: str) -> str:
    return VERSIONS.get(label, "1.0")


def links(num_gpus: int) -> Links:
    return Links(
        kind_GG=tuple(
            tuple("X" if a == b else "NV18" for b in range(num_gpus)) for a in range(num_gpus)
        ),
        peer_GG=((True,) * num_gpus,) * num_gpus,
    )


def laptop(**changes: Any) -> Facts:
    """No GPU, everything that the demo needs."""
    notes = {"torch": "CPU build"}
    absent = {*GPU_LABELS, "triton"}
    facts = Facts(
        system="Linux x86_64",
        python=(3, 11, 7),
        num_cores=2,
        memory_mib=16000,
        packages=tuple(
            package(label, "" if label in absent else version_of(label), notes.get(label, ""))
            for label, _ in PACKAGES
        ),
        missing_extras=(),
        seams=(seam("flags"), seam("dispatch")),
        patch=PatchFact(state="pristine"),
        plugins=tuple(plugin(name) for name in ("moelb", "moelb_standin")),
        sglang_plugins="",
        sglang_platform="",
        driver="",
        gpus=(),
        links=Links(),
    )
    return replace(facts, **changes)


def host(num_gpus: int = 4, **changes: Any) -> Facts:
    """H100s joined by NVLink, everything that a real server needs."""
    packages = tuple(
        package(label, version_of(label), "built for CUDA 13.0" if label == "torch" else "")
        for label, _ in PACKAGES
    )
    facts = laptop(
        packages=packages, gpus=(H100,) * num_gpus, links=links(num_gpus), driver="580.65.06"
    )
    return replace(facts, **changes)


def seam(name: str, **changes: Any) -> SeamFact:
    fact = SeamFact(name=name, form="hook", problem="", expected="f(a)", found="f(a)")
    return replace(fact, **changes)


def plugin(name: str, **changes: Any) -> PluginFact:
    fact = PluginFact(name=name, found=True, allowed=True, platform_allows=True)
    return replace(fact, **changes)


def with_package(facts: Facts, label: str, found: str, note: str = "") -> Facts:
    packages = tuple(package(label, found, note) if p.label == label else p for p in facts.packages)
    return replace(facts, packages=packages)


def row(report: Report, what: str) -> Row:
    return next(r for r in report.rows if r.what == what)


def failing(report: Report) -> set[str]:
    return {r.what for r in report.rows if r.mark is Mark.NO}
