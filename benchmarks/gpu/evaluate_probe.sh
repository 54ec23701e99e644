#!/usr/bin/env bash
# Serve the probe on GPUs of this host and ask it the published test items. Needs SGLang importable.
#   NUM_GPUS=1 OUT=results bash benchmarks/gpu/evaluate_probe.sh
# One GPU: stock SGLang without expert parallelism. More: expert parallel over DeepEP, stock, and
# with the flags of MOELB, if given, compared with stock answer by answer:
#   NUM_GPUS=2 MOELB="--moelb-mode downgrade" bash benchmarks/gpu/evaluate_probe.sh
# MODEL, ITEMS (2,000), SEED (0), CONCURRENCY (128) and PORT can be set.
. "$(dirname "$0")/servers.sh"
num_gpus=${NUM_GPUS:-1} items=${ITEMS:-2000} seed=${SEED:-0}
ranks=()
[ "$num_gpus" -eq 1 ] || ranks=("${expert_parallel[@]}")
common=(--model-path "${MODEL:-$repo/benchmarks/probe/checkpoint}" "${ranks[@]}"
  --mm-attention-backend triton_attn --dtype bfloat16 --context-length 4096
  --mem-fraction-static 0.6 --max-total-tokens 200000)
evaluate() { # server, label, items, then flags; the answer to "how long" is in the result
  local url=${url_of[$1]} label=$2 num=$3
  shift 3
  python3 -m benchmarks.probe.evaluate --url "$url" --items "$num" --seed "$seed" \
    --concurrency "${CONCURRENCY:-128}" --out "$out/evaluation-$label.json" "$@"
}

start stock "${common[@]}"
if [ -n "${MOELB:-}" ]; then
  read -r -a flags <<< "$MOELB"
  start moelb "${common[@]}" "${flags[@]}"
fi
await "${!url_of[@]}"
evaluate stock "warmup-$num_gpus" 300 > /dev/null # kernels are compiled at their first use
evaluate stock "stock-$num_gpus" "$items"
if [ -n "${MOELB:-}" ]; then
  evaluate moelb "warmup-$num_gpus" 300 > /dev/null
  evaluate moelb "moelb-$num_gpus" "$items" --reference "$out/evaluation-stock-$num_gpus.json"
  curl -s "${url_of[moelb]}/moelb/status" > "$out/status-moelb-$num_gpus.json"
fi
