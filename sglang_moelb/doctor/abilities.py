"""What would work here, one row each: servers, the demo, every mode, every role. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_moelb.doctor.facts import Facts, Mark, Row
from sglang_moelb.types import MODES

ABILITY = "what works"
MIN_MEMORY_MIB = 5 * 1024  # a server of 2 ranks on CPU: 5 processes of 0.7 GiB, and the client
RANK_CHOICES = (2, 4, 8)  # one host; DeepEP has tuned configurations for these
LOSSY = ("expand", "drop", "downgrade", "auto")
LOW_PRECISION = {9: "fp8", 10: "mxfp4, not yet run on such GPUs"}  # by major capability
EMULATED_ONLY = "on these GPUs only with downgrade.format nvfp4-emulated or mxfp4-emulated"


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """A condition that does not hold, and what makes it hold."""

    why: str
    fix: str


def num_ranks_possible(facts: Facts) -> int:
    """Largest number of EP ranks that the GPUs of this host can form; 0 without two that fit.

    GPUs count if they have capability 9.0 and reach every GPU before them.
    """
    chosen: list[int] = []
    peers = facts.links.peer_GG
    for index, gpu in enumerate(facts.gpus):
        reached = all(peers[index][other] for other in chosen) if peers else True
        if gpu.capability >= (9, 0) and reached:
            chosen.append(index)
    return max((n for n in RANK_CHOICES if n <= len(chosen)), default=0)


def base_needs(facts: Facts) -> list[Need]:
    """What any server with the plugin lacks here."""
    needs: list[Need] = []
    sglang = facts.package("SGLang")
    if not (3, 11) <= facts.python[:2] <= (3, 12):
        needs.append(Need(why="Python is not 3.11 or 3.12", fix="python3.12 -m venv .venv"))
    if sglang.found != sglang.expected:
        version = sglang.found or "missing"
        needs.append(Need(why=f"SGLang is {version}", fix=f"pip install sglang=={sglang.expected}"))
    if not facts.package("torch").found:
        needs.append(Need(why="torch is missing", fix="pip install torch"))
    broken = [seam.name for seam in facts.seams if seam.problem]
    if broken:
        fix = f"pip install --force-reinstall --no-deps sglang=={sglang.expected}"
        needs.append(Need(why=f"seams do not hold: {', '.join(broken)}", fix=fix))
    if len({seam.form for seam in facts.seams}) > 1:
        fix = "moelb patch revert && moelb patch apply"
        needs.append(Need(why="SGLang is patched in part", fix=fix))
    return needs + _plugin_needs(facts, "moelb")


def cpu_needs(facts: Facts) -> list[Need]:
    """What a server on CPU lacks here."""
    needs = base_needs(facts) + _plugin_needs(facts, "moelb_standin")
    if not facts.system.startswith("Linux"):
        needs.append(Need(why=f"{facts.system} is not Linux", fix="use Linux or WSL 2"))
    if 0 < facts.memory_mib < MIN_MEMORY_MIB:
        free = f"{facts.memory_mib / 1024:.1f} GiB of memory free"
        needs.append(Need(why=free, fix=f"free {MIN_MEMORY_MIB // 1024} GiB"))
    return needs


def demo_needs(facts: Facts) -> list[Need]:
    """What the demo on CPU lacks here."""
    needs = cpu_needs(facts)
    if facts.missing_extras:
        missing = ", ".join(facts.missing_extras)
        needs.append(Need(why=f"missing {missing}", fix="pip install 'sglang-moelb[ab]'"))
    return needs


def gpu_needs(facts: Facts) -> list[Need]:
    """What a real server with DeepEP over the GPUs of this host lacks here."""
    if not facts.gpus:
        return [Need(why="no GPU", fix="use a host with two H100 or newer; here: make demo")]
    needs = base_needs(facts)
    gpu_fix = "pip install 'sglang-moelb[gpu]'"
    missing = [p for p in ("DeepEP", "DeepGEMM", "SGLang kernels") if not facts.package(p).found]
    if missing:
        needs.append(Need(why=f"missing {', '.join(missing)}", fix=gpu_fix))
    if facts.package("torch").note == "CPU build":
        needs.append(Need(why="torch is a CPU build", fix=gpu_fix))
    if not num_ranks_possible(facts):
        why = f"{len(facts.gpus)} GPU(s), fewer than two with capability 9.0 and peer access"
        needs.append(Need(why=why, fix="use a host with two H100 or newer joined by NVLink"))
    return needs


def can_run(facts: Facts) -> bool:
    """Whether a server with the plugin can run here, on CPU or on GPUs."""
    return not cpu_needs(facts) or not gpu_needs(facts)


def abilities(facts: Facts) -> list[Row]:
    """One row for each thing a user may want."""
    gpu, cpu = gpu_needs(facts), cpu_needs(facts)
    ranks = num_ranks_possible(facts)
    return [
        _row("server on CPU", cpu, "launch/serve_moelb.sh tiny-vl_cpu"),
        _row("demo and A/B on CPU", demo_needs(facts), "make demo, or: moelb ab --cpu"),
        _row("EP with DeepEP on GPUs", gpu, f"up to {ranks} ranks: launch/serve_moelb.sh"),
        *(_mode(mode, facts, gpu, cpu) for mode in MODES),
        _role("prefill role", facts, gpu, cpu),
        _role("decode role", facts, gpu, cpu),
        _eplb(facts),
    ]


def _mode(mode: str, facts: Facts, gpu: list[Need], cpu: list[Need]) -> Row:
    what = f"mode {mode}"
    places = [name for name, needs in (("GPUs", gpu), ("CPU", cpu)) if not needs]
    note = "lossy" if mode in LOSSY else "same output as stock"
    if mode == "replicate":
        note += " but for the order of additions"
    if mode == "downgrade" and not gpu:
        note += f"; {_low_precision(facts)}"
    return _row(what, [] if places else cpu, f"on {' and '.join(places)}, {note}")


def _low_precision(facts: Facts) -> str:
    """What `downgrade.format` auto is on the GPUs here, as `ep.low.formats` chooses it."""
    told = {LOW_PRECISION.get(gpu.capability[0], EMULATED_ONLY) for gpu in facts.gpus}
    return ", ".join(sorted(told))


def _role(what: str, facts: Facts, gpu: list[Need], cpu: list[Need]) -> Row:
    """Without a GPU both roles serve on CPU and move the KV cache over TCP."""
    needs = list(gpu if facts.gpus else cpu)
    if not facts.package("KV transfer").found:
        build = "cuda13" if facts.gpus else "non-cuda"
        fix = f"pip install mooncake-transfer-engine-{build}"
        needs.append(Need(why="no KV transfer library", fix=fix))
    script = what.partition(" ")[0]
    return _row(what, needs, f"launch/{script}.sh{'' if facts.gpus else ' tiny-text_cpu'}")


def _eplb(facts: Facts) -> Row:
    """SGLang's own EPLB on Qwen3-VL-MoE and Kimi-VL needs our mends of its gaps."""
    mend = Need(why="SGLang lacks parts of it for these models", fix="moelb patch apply")
    needs = [] if facts.patch.state == "applied" else [mend]
    return _row("stock EPLB on Qwen3-VL-MoE, Kimi-VL", needs, "as an arm of moelb ab")


def _plugin_needs(facts: Facts, name: str) -> list[Need]:
    plugin = next((p for p in facts.plugins if p.name == name), None)
    if plugin is None or not plugin.found:
        fix = "pip install --force-reinstall --no-deps sglang-moelb"
        return [Need(why=f"entry point {name} is missing", fix=fix)]
    if not plugin.allowed:
        fix = f"export SGLANG_PLUGINS={facts.sglang_plugins},{name}"
        return [Need(why=f"SGLANG_PLUGINS leaves {name} out", fix=fix)]
    if not plugin.platform_allows:
        return [Need(why=f"SGLANG_PLATFORM leaves {name} out", fix="unset SGLANG_PLATFORM")]
    return []


def _row(what: str, needs: list[Need], found: str) -> Row:
    if not needs:
        return Row(section=ABILITY, what=what, mark=Mark.OK, found=found)
    why = "; ".join(need.why for need in needs)
    fixes = dict.fromkeys(need.fix for need in needs)
    return Row(section=ABILITY, what=what, mark=Mark.NO, found=why, fix="; ".join(fixes))
