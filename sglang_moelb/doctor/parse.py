"""Read what nvidia-smi prints; text in, facts out. Lines that say nothing are left out.

Shape letters: G GPUs of this host.
"""

from __future__ import annotations

import re

from sglang_moelb.doctor.facts import Gpu

GPU_QUERY = "name,compute_cap,memory.total,driver_version"
_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
_CAPABILITY = re.compile(r"(\d+)\.(\d+)")
_LABEL = re.compile(r"GPU\d+")
_CELL = re.compile(r"X|OK|U|NV\d+|PIX|PXB|PHB|NODE|SYS|[A-Z]*NS|DR")
_CUDA = re.compile(r"^cuda(?::[^=]*)?\s*=\s*(?:'([^']*)'|None)", re.MULTILINE)


def gpus_of(text: str) -> tuple[tuple[Gpu, ...], str]:
    """GPUs and driver version of `nvidia-smi --query-gpu=GPU_QUERY --format=csv,noheader,nounits`.

    A GPU whose capability is not printed (old drivers say [N/A]) gets (0, 0).
    """
    gpus: list[Gpu] = []
    driver = ""
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != 4:
            continue
        match = _CAPABILITY.fullmatch(fields[1])
        capability = (int(match[1]), int(match[2])) if match else (0, 0)
        memory_mib = int(fields[2]) if fields[2].isdigit() else 0
        gpus.append(Gpu(name=fields[0], capability=capability, memory_mib=memory_mib))
        driver = fields[3]
    return tuple(gpus), driver


def matrix_of(text: str) -> tuple[tuple[str, ...], ...]:
    """The GPU-to-GPU part of `nvidia-smi topo -m` or `topo -p2p r`; () if there is none.

    Columns of network cards and affinities, which `topo -m` appends, are left out.
    """
    lines = [line.split() for line in _ESCAPE.sub("", text).splitlines()]
    rows = [w for w in lines if len(w) > 1 and _LABEL.fullmatch(w[0]) and _CELL.fullmatch(w[1])]
    if any(len(row) <= len(rows) for row in rows):
        return ()
    return tuple(tuple(row[1 : len(rows) + 1]) for row in rows)


def peers_of(matrix_GG: tuple[tuple[str, ...], ...]) -> tuple[tuple[bool, ...], ...]:
    """`topo -p2p r` as booleans; a GPU reaches itself."""
    return tuple(tuple(cell in ("OK", "X") for cell in row) for row in matrix_GG)


def cuda_of(version_source: str) -> str:
    """The CUDA version torch was built for, from the text of `torch/version.py`; "" if none."""
    match = _CUDA.search(version_source)
    return (match[1] or "") if match else ""
