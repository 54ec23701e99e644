#!/usr/bin/env bash
# The tests in both forms of the seams: on the installed SGLang, which gets hooks, and on a copy of
# it that has the patch set. In two lanes at a time: tests that start a server, one server after the
# other, and beside them everything else, mypy too. The installed SGLang is never touched.
#   scripts/test_both_forms.sh ci    what is patched: only tests that reach SGLang; no slow test
#   scripts/test_both_forms.sh all   the whole suite, slow tests included, and the demo in each form
set -euo pipefail
cd "$(dirname "$0")/.."
BIN=${BIN:-.venv/bin}
scope=${1:-ci}

case $scope in
  ci)
    unless_slow=" and not slow"
    # Left out: what runs without the plugin, what needs a server for itself, and one long test.
    patched_servers=(tests/e2e/test_bit_identity.py tests/e2e/test_levers.py
      -k "not text_with_tensor and not hot_changes and not room")
    patched_others=(tests/ep/test_seams.py tests/ep/test_runtime.py tests/ep/test_flags.py)
    ;;
  all) unless_slow="" patched_servers=(tests) patched_others=(tests) ;;
  *) echo "usage: scripts/test_both_forms.sh ci|all" >&2; exit 2 ;;
esac

work=$(mktemp -d)
copy=$work/site
others=
# The second lane has a process group of its own, so that nothing of it outlives this script.
trap '[[ -z $others ]] || kill -- "-$others" 2>/dev/null || true; rm -rf "$work"' EXIT
site=$("$BIN/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

expect() {  # expect STATE DIR: that Python finds SGLang in DIR, and that it is pristine or applied
  local said
  said=$(PYTHONPATH=$2 "$BIN/moelb" patch status | tail -n 1) || true
  [[ $said == *" in $2: $1,"* ]] || { echo "expected it $1 in $2, found: $said" >&2; exit 2; }
}

run() {  # run FORM WHAT COMMAND...: run it, and note in the summary how it ended
  local form=$1 what=$2 begun=$SECONDS code=0 path=${PYTHONPATH:-}
  shift 2
  [[ $form == hooked ]] || path=$copy${path:+:$path}
  printf '\n== [%d s] %s, %s form: %s\n' "$SECONDS" "$what" "$form" "$*"
  PYTHONPATH=$path "$@" || code=$?
  printf 'exit code %d after %4d s: %s, %s form\n' \
    "$code" $((SECONDS - begun)) "$what" "$form" >>"$work/summary"
  return "$code"
}

tests() {  # tests FORM WHAT MARKS ARGUMENTS...
  run "$1" "$2" "$BIN/python" -m pytest -m "$3" "${@:4}"
}

servers_lane() {
  local code=0
  tests patched "tests with servers" "e2e$unless_slow" "${patched_servers[@]}" || code=$?
  tests hooked "tests with servers" "e2e$unless_slow" tests || code=$?
  [[ $scope == all ]] || return "$code"
  for form in patched hooked; do
    run "$form" demo "$BIN/python" -m sglang_moelb.demo --out "$work/demo-$form" || code=$?
  done
  return "$code"
}

others_lane() {
  local code=0
  run hooked mypy "$BIN/mypy" sglang_moelb || code=$?
  tests patched "tests without servers" "not e2e$unless_slow" "${patched_others[@]}" || code=$?
  tests hooked "tests without servers" "not e2e$unless_slow" tests || code=$?
  return "$code"
}

expect pristine "$site"
mkdir "$copy"
cp -a "$site"/sglang "$site"/sglang-*.dist-info "$copy"
"$BIN/moelb" patch apply --site "$copy"
expect applied "$copy"

set -m
others_lane >"$work/others.log" 2>&1 </dev/null &
others=$!
set +m
code=0
servers_lane || code=$?
wait "$others" || code=$?
others=
cat "$work/others.log"

"$BIN/moelb" patch revert --site "$copy"
diff -rq -x __pycache__ "$site/sglang" "$copy/sglang" || code=1
expect pristine "$site"
printf '\n== [%d s] summary\n' "$SECONDS"
cat "$work/summary"
exit "$code"
