#!/usr/bin/env bash
# Whether models of the DeepSeek family answer with the balancer as without it, on GPUs: DeepSeek-V2-Lite's
# shapes, and DeepSeek-V3's routing. A stock and a balanced server a model, one model after the other;
# times mean nothing. Ranks may share a GPU.
#   NUM_GPUS=1 NUM_RANKS=2 OUT=results bash benchmarks/gpu/check_models.sh deepseek2 deepseek3
# One JSON line a model and mode in $OUT/models.jsonl. Ends with 1 where mode none differs from stock in a bit,
# replicate in a token, a lever did not act, or a model did not run; the others run all the same.
# A rank's SLOTS (16) are for SKEW (2); LAYERS (4), MAX_TOTAL (KV tokens) and MEM_FRACTION size the servers.
. "$(dirname "$0")/servers.sh"
lay_plugin moelb_bench moelb_bench=benchmarks.gpu.skew_plugin:register
export MOELB_BENCH_SKEW="$plugins/skew" MOELB_BENCH_VISION=1
modes=none,replicate,downgrade@1.0,drop@1.0

check() { # kind
  local kind=$1 model=$plugins/$1 common
  echo 0 > "$MOELB_BENCH_SKEW"
  python3 -m benchmarks.gpu.write_deepseek --kind "$kind" --layers "${LAYERS:-4}" --out "$model"
  common=(--model-path "$model" --load-format dummy --skip-tokenizer-init
    "${expert_parallel[@]}" --disable-shared-experts-fusion
    --chunked-prefill-size "$((8192 * num_ranks))" --max-prefill-tokens "$((8192 * num_ranks))"
    --disable-cuda-graph --mem-fraction-static "${MEM_FRACTION:-0.85}"
    --max-total-tokens "${MAX_TOTAL:-40000}")
  start "stock-$kind" "${common[@]}"
  start "moelb-$kind" "${common[@]}" --moelb-mode replicate \
    --moelb-config "{\"replicate\": {\"slots\": ${SLOTS:-16}}, \"downgrade\": {\"ready\": true}}"
  await "stock-$kind" "moelb-$kind"
  timeout 300 python3 -m benchmarks.gpu.check_models --model "$kind" --skew "${SKEW:-2}" \
    --skew-file "$MOELB_BENCH_SKEW" --server "stock=${url_of[stock-$kind]}=stock" \
    --server "moelb=${url_of[moelb-$kind]}=$modes" --hardware "$(hardware "${NUM_GPUS:-1}")" \
    --commit "${COMMIT:-}" --out "$out/models.jsonl"
}

code=0
[ "$#" -gt 0 ] || set -- deepseek2 deepseek3
for kind in "$@"; do
  (trap stop_servers EXIT; check "$kind") & wait "$!" || { code=1; echo "$kind: failed" >&2; }
  next_port=$((next_port + 2000))
done
exit "$code"
