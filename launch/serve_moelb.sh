#!/usr/bin/env bash
# SGLang with the controller, mode auto.  launch/serve_moelb.sh RECIPE [FLAGS...]
# The last of a flag counts: append --moelb-mode observe to choose another mode.
. "$(dirname "$0")/common.sh"
[[ $# -ge 1 ]] || die "usage: serve_moelb.sh RECIPE [SGLANG AND --moelb FLAGS...]"
read_recipe "$1"
start "${server[@]}" --moelb-mode auto "${moelb_flags[@]}" "${@:2}"
