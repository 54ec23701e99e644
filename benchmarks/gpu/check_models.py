"""Whether a balanced server answers as the stock one does; called by `check_models.sh`."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

from benchmarks.gpu import result_rows
from benchmarks.gpu.bench_prefill import Server, outputs
from benchmarks.gpu.compare_outputs import print_outputs


def row(mode: str, first: dict[str, Any], one: dict[str, Any]) -> dict[str, Any]:
    """What a mode answered beside stock, and the last pass as its status tells it."""
    pairs = [
        pair for kind in ("single", "batch") for pair in zip(first[kind], one[kind], strict=True)
    ]
    apart = [abs(a[0] - b[0]) for a, b in pairs]
    return {
        "mode": mode,
        "tokens": len(pairs),
        "equal_tokens": sum(a[1] == b[1] for a, b in pairs),
        "bit_equal": all(list(a) == list(b) for a, b in pairs),
        "max_apart": max(apart),
        "mean_apart": sum(apart) / len(apart),
        "pass": one["pass"],
    }


def faults(rows: list[dict[str, Any]]) -> list[str]:
    """What must not be: bits that differ in none, tokens in replicate, a lever that did not act."""
    found = []
    for one in rows:
        name = one["mode"].partition("@")[0]
        if name == "none" and not one["bit_equal"]:
            found.append(f"none: at most {one['max_apart']} apart from stock")
        if name == "replicate" and one["equal_tokens"] < one["tokens"]:
            found.append(f"replicate: {one['equal_tokens']} of {one['tokens']} tokens equal")
        if name not in ("stock", "none") and one["pass"].get("lever") != name:
            found.append(f"{name}: the last pass had lever {one['pass'].get('lever')}")
    return found


def main() -> None:
    """Ask, compare, append a row a mode; ends with 1 at a fault."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--server", action="append", type=Server.parse, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--skew", dest="skews", default="2")
    parser.add_argument("--skew-file", required=True)
    parser.add_argument("--tokens", type=int, default=2048, help="of a request of the batch")
    parser.add_argument("--batch", type=int, default=8, help="requests")
    result_rows.add_arguments(parser)
    args = parser.parse_args()
    said = asyncio.run(outputs(args))
    first = next(iter(said.values()))
    rows = [row(name.partition(" ")[2], first, one) for name, one in said.items()]
    named = {"hardware": args.hardware, "commit": args.commit, "model": args.model}
    result_rows.append([{**named, **one} for one in rows], args.out)
    print_outputs(said)
    found = faults(rows)
    if found:
        raise SystemExit(f"{args.model}: " + "; ".join(found))


if __name__ == "__main__":
    main()
