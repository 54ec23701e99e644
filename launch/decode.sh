#!/usr/bin/env bash
# The decode role of a disaggregated deployment: routing is left alone, --moelb-mode none.
# launch/decode.sh RECIPE [FLAGS...]; append --moelb-mode observe to count there too.
. "$(dirname "$0")/common.sh"
[[ $# -ge 1 ]] || die "usage: decode.sh RECIPE [SGLANG AND --moelb FLAGS...]"
read_recipe "$1"
[[ -n ${DECODE_FLAGS:-} ]] || die "recipe '$1' has no DECODE_FLAGS, so no decode role"
read -ra role <<< "$DECODE_FLAGS"
start "${server[@]}" --disaggregation-mode decode "${role[@]}" --moelb-mode none "${@:2}"
