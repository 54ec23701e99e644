#!/usr/bin/env bash
# Run every kernel under compute-sanitizer on one GPU.
#   OUT=results bash tests/gpu/sanitize.sh
# The small checks run once by themselves, which compiles, then under each tool: memcheck, racecheck.
# Prints a line for each tool and file, keeps all output in $OUT/sanitize_*.txt, and ends with status
# 1 if a check fails or a tool finds an error or a hazard.
# PYTHON, SANITIZER, TOOLS and JOBS (processes at a time) may be given. initcheck is left out: outputs
# hold room and padding that nobody writes, and comparing them on the device reads it. A kernel that
# takes such values differs from its reference.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OUT=${OUT:-results} PYTHON=${PYTHON:-python3} PYTHONUNBUFFERED=1
export PATH=$PATH:/usr/local/cuda/bin
export SANITIZER=${SANITIZER:-compute-sanitizer}
tools=${TOOLS:-memcheck racecheck} jobs=${JOBS:-8}
command -v "$SANITIZER" >/dev/null || { echo "no $SANITIZER here: give SANITIZER" >&2; exit 2; }
mkdir -p "$OUT"
# Without torch's cache each tensor is an allocation, so memcheck knows where it ends.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
checks=("check_kernels.py --small" "check_replicas.py --small" "check_fp4.py --small"
  "check_fp8.py --small" "check_copies.py")

run_one() { # "TOOL FILE OPTION..."
  local tool file options log found start=$SECONDS status=0
  read -r tool file options <<<"$1"
  log=$OUT/sanitize_${tool}_${file%.py}.txt
  local under=()
  if [[ $tool != alone ]]; then
    # Triton's loader tries more shared memory than a device has and takes the error for an answer.
    under=("$SANITIZER" --tool "$tool" --report-api-errors no --error-exitcode 1
      --target-processes all)
  fi
  # shellcheck disable=SC2086 # options are words
  "${under[@]}" "$PYTHON" "tests/gpu/$file" $options >"$log" 2>&1 || status=$?
  found=$(sed -nE 's/^=+ .*SUMMARY: //p' "$log" | paste -sd ';')
  if [[ $tool == alone ]]; then
    found=-
  elif [[ -z $found ]]; then
    found="the tool told no sum" status=1
  elif grep -Eqv '^0 (errors|hazards)' <<<"${found//;/$'\n'}"; then
    status=1
  fi
  printf '%-10s %-18s %4d s  status %d  %s\n' "$tool" "$file" $((SECONDS - start)) "$status" "$found"
  if ((status)); then tail -n 15 "$log" | sed 's/^/    /'; fi
  return $((status != 0))
}
export -f run_one

run_all() { # tools; status 123 if one failed
  local tool check
  for tool in "$@"; do
    for check in "${checks[@]}"; do printf '%s\0' "$tool $check"; done
  done | xargs -0 -n 1 -P "$jobs" bash -c 'run_one "$1"' _
}

run_all alone || { echo "a check fails without any tool, after $SECONDS s" >&2; exit 1; }
# shellcheck disable=SC2086 # tools are words
run_all $tools || { echo "errors, after $SECONDS s: see $OUT" >&2; exit 1; }
echo "no errors, after $SECONDS s"
