#!/usr/bin/env bash
# Stock against the controller on the same requests.  launch/ab.sh RECIPE [moelb ab OPTIONS...]
. "$(dirname "$0")/common.sh"
[[ $# -ge 1 ]] || die "usage: ab.sh RECIPE [moelb ab OPTIONS...]"
read_recipe "$1"
where=(--gpu) && common=(--tp-size "$RANKS" "${flags[@]}")
[[ $DEVICE != cpu ]] || { where=(--cpu --ranks "$RANKS"); common=("${flags[@]}"); }
printf -v arm ' %q' auto "${moelb_flags[@]}"  # moelb ab splits an arm as a shell does
start moelb ab --model "$MODEL" "${where[@]}" --arm stock= \
  --arm "auto=--moelb-mode$arm" "${@:2}" -- "${common[@]}"
