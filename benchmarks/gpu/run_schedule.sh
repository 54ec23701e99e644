#!/usr/bin/env bash
# Mode auto on a schedule of changing loads against every single mode, in one server on the GPUs of
# one host, with memory for replicate (SLOTS) and downgrade; see bench_schedule.py. On the shapes of
# Qwen3-30B-A3B with LAYERS (12). Needs SGLang, DeepEP and DeepGEMM importable.
#   NUM_GPUS=2 SLOTS=32 OUT=results bash benchmarks/gpu/run_schedule.sh [flags of bench_schedule.py]
. "$(dirname "$0")/servers.sh"
num_gpus=${NUM_GPUS:?}
lay_plugin moelb_bench moelb_bench=benchmarks.gpu.skew_plugin:register \
  moelb_bench_times=benchmarks.gpu.pass_times:register
export MOELB_BENCH_SKEW="$plugins/skew" MOELB_BENCH_TIMES="$out/passes-auto-schedule.jsonl"
echo 0 > "$MOELB_BENCH_SKEW"
write_qwen3_moe "$plugins/model"
start auto --model-path "$plugins/model" --load-format dummy --skip-tokenizer-init \
  "${expert_parallel[@]}" --chunked-prefill-size "$((16384 * num_gpus))" \
  --max-prefill-tokens "$((16384 * num_gpus))" --mem-fraction-static 0.85 \
  --max-total-tokens "${MAX_TOTAL:-100000}" --moelb-mode auto --moelb-config \
  "{\"replicate\": {\"ready\": true, \"slots\": ${SLOTS:-32}}, \"downgrade\": {\"ready\": true}}"
await auto
python3 -m benchmarks.gpu.bench_schedule --url "${url_of[auto]}" --skew-file "$MOELB_BENCH_SKEW" \
  --ranks "$num_gpus" --hardware "$(hardware "$num_gpus")" --commit "${COMMIT:-}" \
  --out "$out/schedule.jsonl" "$@"
curl -s "${url_of[auto]}/moelb/status" > "$out/status-auto-schedule.json"
python3 -m benchmarks.gpu.compare_passes "$out"
