#!/usr/bin/env bash
# Train, export and measure the probe on one GPU. All results under $OUT, at most 8 files of at most
# 16 MiB (the model in two parts), so that they can be carried anywhere.
#   OUT=results MINUTES=8 SEED=0 BALANCE=0.001 bash benchmarks/gpu/train_probe.sh
# Longer than one command may run? PAUSE_AFTER=4 stops after so many minutes; the same command
# again goes on. STEPS=6800 trains a fixed number of steps. WORK keeps the checkpoint between runs.
# Extra flags of benchmarks.probe.train go into FLAGS, e.g. FLAGS="--compile --workers 16".
set -euo pipefail
out=${OUT:-results} minutes=${MINUTES:-8} seed=${SEED:-0} balance=${BALANCE:-0.001}
repo=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$out"
out=$(cd "$out" && pwd)
work=${WORK:-${TMPDIR:-/tmp}/probe-work-$seed-$balance}
mkdir -p "$work"
cd "$repo"
export PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export PYTORCH_ALLOC_CONF=expandable_segments:True OMP_NUM_THREADS=4
python=${PYTHON:-python3}
flags=(--out "$work" --minutes "$minutes" --seed "$seed" --balance-loss "$balance" --resume)
[[ -n ${STEPS:-} ]] && flags+=(--steps "$STEPS")
[[ -n ${PAUSE_AFTER:-} ]] && flags+=(--pause-after "$PAUSE_AFTER")
read -r -a extra <<< "${FLAGS:-}"

rm -rf "$work/model"
echo "$ train ${flags[*]} ${extra[*]:-}" >> "$work/train.log"
"$python" -m benchmarks.probe.train "${flags[@]}" ${extra[@]+"${extra[@]}"} 2>&1 | tee -a "$work/train.log"
cp "$work/train.log" "$work/curve.jsonl" "$out/"
if [[ ! -f $work/model/model.safetensors ]]; then
  echo "not finished: run the same command again to go on"
  exit 0
fi
read -r -a skew_extra <<< "${SKEW_FLAGS:-}"
"$python" -m benchmarks.probe.skew --model "$work/model" --out "$work/skew.json" \
  --workers "${SKEW_WORKERS:-15}" ${skew_extra[@]+"${skew_extra[@]}"} | tee "$work/skew.txt"
"$python" -m benchmarks.probe.figures --out "$work"
cp "$work/skew.json" "$work/training.png" "$work/experts.png" "$out/"
# cat model.tar.part* | tar x   gives the folder `model` back.
tar -C "$work" -cf - model | split -b 15m - "$out/model.tar.part"
cat "$work/skew.txt" >> "$out/train.log"
echo "--- $(du -sh "$work/model" | cut -f1) in $work/model; results in $out"
tail -n 22 "$work/train.log"
