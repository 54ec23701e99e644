"""Facts in, rows out: what each found thing means here, and the fix where it does not work.

Pure: asks nothing of the machine, so every judgement is tested with made-up facts.
"""

from __future__ import annotations

from sglang_moelb.doctor.abilities import abilities, can_run
from sglang_moelb.doctor.facts import Facts, Mark, Package, PluginFact, Report, Row

INSTALLED = "installed"
SEAMS = "seams"
PLUGIN = "plugin"
HARDWARE = "hardware"
GPU_ONLY = ("DeepEP", "DeepGEMM", "SGLang kernels", "flashinfer", "triton")
GPU_FIX = "pip install 'sglang-moelb[gpu]'"
# label, when it is needed, what brings it
OPTIONAL = {
    "KV transfer": ("prefill and decode roles", "pip install mooncake-transfer-engine-cuda13"),
    "prometheus-client": ("--enable-metrics", "pip install prometheus-client"),
}


def judge(facts: Facts) -> Report:
    """The whole table, and whether something can run."""
    rows = (
        _python(facts),
        *(_package(facts, package) for package in facts.packages),
        _extras(facts),
        *_seams(facts),
        _patch(facts),
        *(_plugin(facts, plugin) for plugin in facts.plugins),
        *_hardware(facts),
        *abilities(facts),
    )
    return Report(rows=rows, can_run=can_run(facts))


def _python(facts: Facts) -> Row:
    found = ".".join(str(part) for part in facts.python)
    fits = (3, 11) <= facts.python[:2] <= (3, 12)
    return Row(
        section=INSTALLED,
        what="Python",
        mark=Mark.OK if fits else Mark.NO,
        found=f"{found} on {facts.system}",
        fix="" if fits else "use Python 3.11 or 3.12: python3.12 -m venv .venv",
    )


def _package(facts: Facts, package: Package) -> Row:
    if not package.found:
        return _missing(facts, package)
    found = " ".join(filter(None, (package.found, package.note)))
    if package.label == "torch" and facts.gpus and package.note == "CPU build":
        return _installed("torch", Mark.NO, f"{found}, but there are GPUs", GPU_FIX)
    wrong = package.expected and package.found.partition("+")[0] != package.expected
    if not wrong:
        return _installed(package.label, Mark.OK, found, "")
    found += f", SGLang asks for {package.expected}"
    if package.label == "SGLang":
        found = f"{package.found}, expected {package.expected}"
    # Without GPUs any recent CPU build of torch serves.
    strict = package.label == "SGLang" or facts.gpus
    mark = Mark.NO if strict else Mark.NOTE
    return _installed(package.label, mark, found, _install(package) if strict else "")


def _missing(facts: Facts, package: Package) -> Row:
    label = package.label
    if label in OPTIONAL:
        use, fix = OPTIONAL[label]
        return _installed(label, Mark.NOTE, f"not installed, needed for {use} only", fix)
    if label in GPU_ONLY and not facts.gpus:
        return _installed(label, Mark.NOTE, "not installed, not needed without GPUs", "")
    return _installed(label, Mark.NO, "not installed", _install(package))


def _install(package: Package) -> str:
    if package.label in GPU_ONLY:
        return GPU_FIX
    pin = f"=={package.expected}" if package.expected else ""
    return f"pip install {package.distribution}{pin}"


def _installed(what: str, mark: Mark, found: str, fix: str) -> Row:
    return Row(section=INSTALLED, what=what, mark=mark, found=found, fix=fix)


def _extras(facts: Facts) -> Row:
    missing = facts.missing_extras
    return _installed(
        "A/B tool",
        Mark.NO if missing else Mark.OK,
        f"missing {', '.join(missing)}" if missing else "all it needs",
        "pip install 'sglang-moelb[ab]'" if missing else "",
    )


def _seams(facts: Facts) -> list[Row]:
    if not facts.seams:
        return [
            Row(
                section=SEAMS,
                what="all",
                mark=Mark.NO,
                found="SGLang is not installed",
                fix=_install(facts.package("SGLang")),
            )
        ]
    fix = _install(facts.package("SGLang")) + " --force-reinstall --no-deps"
    return [
        Row(
            section=SEAMS,
            what=seam.name,
            mark=Mark.NO if seam.problem else Mark.OK,
            found=f"{seam.problem}: expected {seam.expected}, found {seam.found}"
            if seam.problem
            else f"holds, as {seam.form}",
            fix=fix if seam.problem else "",
        )
        for seam in facts.seams
    ]


def _patch(facts: Facts) -> Row:
    state, error = facts.patch.state, facts.patch.error
    fixes = {
        "pristine": "",
        "applied": "",
        "modified": _install(facts.package("SGLang")) + " --force-reinstall --no-deps",
        "unknown": "",
    }
    words = {
        "pristine": "not applied: hooks are used instead",
        "applied": "applied: calls in SGLang's source are used",
        "unknown": error,
    }
    known = state in ("pristine", "applied")
    return Row(
        section=SEAMS,
        what="patch set",
        mark=Mark.OK if known else Mark.NO,
        found=words.get(state, state),
        fix=fixes.get(state, "moelb patch revert && moelb patch apply"),
    )


def _plugin(facts: Facts, plugin: PluginFact) -> Row:
    def row(mark: Mark, found: str, fix: str = "") -> Row:
        return Row(section=PLUGIN, what=plugin.name, mark=mark, found=found, fix=fix)

    if not plugin.found:
        fix = "pip install --force-reinstall --no-deps sglang-moelb"
        return row(Mark.NO, "its entry point is not installed", fix)
    if not plugin.allowed:
        fix = f"export SGLANG_PLUGINS={facts.sglang_plugins},{plugin.name}"
        return row(Mark.NO, f"left out by SGLANG_PLUGINS={facts.sglang_plugins}", fix)
    if not plugin.platform_allows:
        found = f"left out by SGLANG_PLATFORM={facts.sglang_platform}"
        return row(Mark.NO, found, "unset SGLANG_PLATFORM")
    return row(Mark.OK, "SGLang loads it")


def _hardware(facts: Facts) -> list[Row]:
    host = Row(
        section=HARDWARE,
        what="host",
        mark=Mark.OK,
        found=f"{facts.num_cores} cores, {facts.memory_mib / 1024:.0f} GiB free memory",
    )
    if not facts.gpus:
        none = Row(section=HARDWARE, what="GPUs", mark=Mark.NOTE, found="none: CPU stand-in only")
        return [host, none]
    gpus = [
        Row(
            section=HARDWARE,
            what=f"GPU {index}",
            mark=Mark.OK if gpu.capability >= (9, 0) else Mark.NO,
            found=f"{gpu.name}, compute capability {gpu.capability[0]}.{gpu.capability[1]}, "
            f"{gpu.memory_mib / 1024:.0f} GiB",
            fix="" if gpu.capability >= (9, 0) else "DeepEP and DeepGEMM need 9.0 or more (H100)",
        )
        for index, gpu in enumerate(facts.gpus)
    ]
    driver = Row(
        section=HARDWARE,
        what="driver",
        mark=Mark.OK if facts.driver else Mark.NOTE,
        found=facts.driver or "unknown: nvidia-smi is not on PATH",
    )
    return [host, driver, *gpus, _link_row(facts)]


def _link_row(facts: Facts) -> Row:
    kinds = {
        kind
        for row, line in enumerate(facts.links.kind_GG)
        for column, kind in enumerate(line)
        if row != column
    }
    blind = _blind_pairs(facts)
    if len(facts.gpus) == 1:
        return Row(section=HARDWARE, what="links", mark=Mark.NOTE, found="one GPU, none needed")
    found = ", ".join(sorted(kinds)) or "unknown: nvidia-smi topo -m says nothing"
    if blind:
        found += f"; no peer access between {', '.join(blind[:4])}"
    return Row(
        section=HARDWARE,
        what="links",
        mark=Mark.NO if blind else (Mark.OK if kinds else Mark.NOTE),
        found=found,
        fix="use GPUs joined by NVLink: CUDA_VISIBLE_DEVICES; nvidia-smi topo -p2p r"
        if blind
        else "",
    )


def _blind_pairs(facts: Facts) -> list[str]:
    return [
        f"{a}-{b}"
        for a, row in enumerate(facts.links.peer_GG)
        for b, reaches in enumerate(row)
        if a < b and not reaches
    ]
