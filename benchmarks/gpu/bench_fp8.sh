#!/usr/bin/env bash
# Check the fp8 kernels and the downgrade plan on one GPU, then time them; results under $OUT.
#   OUT=results bash benchmarks/gpu/bench_fp8.sh
# Under compute-sanitizer: tests/gpu/sanitize.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${OUT:-results} python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONUNBUFFERED=1
"$python" tests/gpu/check_fp8.py 2>&1 | tee "$out/fp8_check.txt"
echo "checks took $SECONDS s"
"$python" benchmarks/gpu/bench_fp8.py --out "$out/fp8.jsonl" 2>&1 | tee "$out/fp8_bench.txt"
echo "$SECONDS s in all"
