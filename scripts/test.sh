#!/usr/bin/env bash
# scripts/test.sh all: what CI runs. scripts/test.sh check: all of it that starts no server.
# BIN=/some/venv/bin chooses another environment than .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
export BIN=${BIN:-.venv/bin}

step() {
  printf '\n== [%d s] %s\n' "$SECONDS" "$*"
  "$@"
}

step "$BIN/ruff" check .
step "$BIN/mypy" sglang_moelb
case ${1:-all} in
  check) step "$BIN/python" -m pytest -m 'not e2e and not dist' ;;
  all) step bash scripts/test_both_forms.sh ;;
  *) echo "usage: scripts/test.sh all|check" >&2; exit 2 ;;
esac
