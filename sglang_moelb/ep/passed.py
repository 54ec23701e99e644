"""How often each seam was passed through in this process, and the check after the first prefill.

A seam that SGLang does not pass through would leave a balancer that silently does not balance.
"""

from __future__ import annotations

from collections import Counter

from sglang_moelb.ep.seams import SEAMS

num_passed: Counter[str] = Counter()


def verify_passed() -> None:
    """End the process unless every seam of a prefill has been passed through by now."""
    missed = [
        f"  {seam.name}: {seam.target}"
        for seam in SEAMS
        if seam.moment == "prefill" and num_passed[seam.name] == 0
    ]
    if missed:
        raise SystemExit(
            "sglang_moelb: after the first prefill these seams had not been passed through, so "
            "the balancer would silently not balance:\n" + "\n".join(missed)
        )
