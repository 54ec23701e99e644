#!/usr/bin/env bash
# Check the fp8 kernels and the downgrade plan on one GPU, then time them; results under $OUT.
#   OUT=results bash benchmarks/gpu/bench_fp8.sh
# SANITIZE=1 runs the small checks under compute-sanitizer (memcheck, then racecheck) instead.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${OUT:-results} python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONUNBUFFERED=1
if [[ -n ${SANITIZE:-} ]]; then
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  "$python" tests/gpu/check_fp8.py --small >/dev/null # compiles, outside of the sanitizer
  for tool in memcheck racecheck; do
    # Triton's loader tries more shared memory than a device has and takes the error for an answer.
    compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 1 --target-processes all \
      "$python" tests/gpu/check_fp8.py --small 2>&1 | tee "$out/fp8_$tool.txt" | tail -n 12
  done
  exit 0
fi
"$python" tests/gpu/check_fp8.py 2>&1 | tee "$out/fp8_check.txt"
echo "checks took $SECONDS s"
"$python" benchmarks/gpu/bench_fp8.py --out "$out/fp8.jsonl" 2>&1 | tee "$out/fp8_bench.txt"
echo "$SECONDS s in all"
