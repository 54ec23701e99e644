#!/usr/bin/env bash
# The prefill role of a disaggregated deployment, with the full controller.
# launch/prefill.sh RECIPE [FLAGS...]; append --moelb-mode M for another mode.
. "$(dirname "$0")/common.sh"
[[ $# -ge 1 ]] || die "usage: prefill.sh RECIPE [SGLANG AND --moelb FLAGS...]"
read_recipe "$1"
[[ -n ${PREFILL_FLAGS:-} ]] || die "recipe '$1' has no PREFILL_FLAGS, so no prefill role"
read -ra role <<< "$PREFILL_FLAGS"
start "${server[@]}" --disaggregation-mode prefill "${role[@]}" --moelb-mode auto \
  "${moelb_flags[@]}" "${@:2}"
