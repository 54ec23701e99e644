#!/usr/bin/env bash
# scripts/test.sh check: all of the tests that start no process of a server.
# scripts/test.sh ci|all: everything, see scripts/test_both_forms.sh.
# BIN=/some/venv/bin chooses another environment than .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
export BIN=${BIN:-.venv/bin}

step() {
  printf '\n== [%d s] %s\n' "$SECONDS" "$*"
  "$@"
}

step "$BIN/ruff" check .
case ${1:-ci} in
  check)
    step "$BIN/mypy" sglang_moelb
    step "$BIN/python" -m pytest -m 'not e2e and not dist'
    ;;
  ci | all) step bash scripts/test_both_forms.sh "${1:-ci}" ;;
  *) echo "usage: scripts/test.sh check|ci|all" >&2; exit 2 ;;
esac
