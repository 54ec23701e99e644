#!/usr/bin/env bash
# The tests in both forms of the seams: what reaches SGLang with the patch set applied to the
# environment, then everything on SGLang as its wheel has it, with hooks. The environment is
# pristine again whatever happens.
#   MARKS="slow or not slow" runs the slow tests too;  FAST=1 leaves the patched form out;  PATCHED_TESTS="tests/ep" narrows it.
set -euo pipefail
cd "$(dirname "$0")/.."
BIN=${BIN:-.venv/bin}
# Left out: what runs without the plugin, and what does not get as far as a seam.
default="tests/ep/test_seams.py tests/ep/test_runtime.py tests/e2e/test_bit_identity.py tests/e2e/test_levers.py"
read -ra patched_tests <<< "${PATCHED_TESTS:-$default}"

state() { "$BIN/moelb" patch status | tail -n 1; }
is_pristine() { [[ $(state) == *": pristine,"* ]]; }

if ! is_pristine; then
  echo "the environment's SGLang is not pristine: $(state)" >&2
  echo "run: $BIN/moelb patch revert" >&2
  exit 2
fi

patched=0
if [[ -z ${FAST:-} ]]; then
  trap '"$BIN/moelb" patch revert' EXIT
  "$BIN/moelb" patch apply
  printf '\n== [%d s] patched form: %s\n' "$SECONDS" "${patched_tests[*]}"
  "$BIN/python" -m pytest -k "not text_with_tensor and not two_hundred" "${patched_tests[@]}" || patched=$?
  "$BIN/moelb" patch revert
  trap - EXIT
  is_pristine || { echo "moelb patch revert left: $(state)" >&2; exit 1; }
fi

printf '\n== [%d s] hooked form: the whole suite\n' "$SECONDS"
"$BIN/python" -m pytest -m "${MARKS:-not slow}"
if [[ $patched -ne 0 ]]; then
  echo "the tests failed in the patched form, see above" >&2
  exit "$patched"
fi
