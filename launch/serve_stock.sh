#!/usr/bin/env bash
# SGLang as it is.  launch/serve_stock.sh RECIPE [SGLANG FLAGS...]
. "$(dirname "$0")/common.sh"
[[ $# -ge 1 ]] || die "usage: serve_stock.sh RECIPE [SGLANG FLAGS...]"
read_recipe "$1"
start "${server[@]}" "${@:2}"
