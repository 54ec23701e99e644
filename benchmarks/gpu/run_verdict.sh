#!/usr/bin/env bash
# Does the verdict of a live server tell what following it brings? One server on GPUs of one host,
# the shapes of run_prefill.sh, imposed skews. Needs SGLang, DeepEP and DeepGEMM importable.
#   NUM_GPUS=2 OUT=results bash benchmarks/gpu/run_verdict.sh
# Under 150 seconds after the server is up. On R ranks no skew above R can be imposed. FLAGS are
# further flags of the server.
. "$(dirname "$0")/servers.sh"
num_gpus=${NUM_GPUS:?} tokens=${TOKENS:-16384}
skews=${SKEWS:-$([ "$num_gpus" -ge 4 ] && echo 1,2,3 || echo 1,1.5,2)}
lay_plugin moelb_bench moelb_bench=benchmarks.gpu.skew_plugin:register
export MOELB_BENCH_SKEW="$plugins/skew"
echo 0 > "$MOELB_BENCH_SKEW"
write_qwen3_moe "$plugins/model"
read -r -a flags <<< "${FLAGS:-}"
start verdict --model-path "$plugins/model" --load-format dummy --skip-tokenizer-init \
  "${expert_parallel[@]}" --chunked-prefill-size "$((tokens * num_gpus))" \
  --max-prefill-tokens "$((tokens * num_gpus))" --mem-fraction-static 0.6 \
  --moelb-mode observe --moelb-verdict ${flags[@]+"${flags[@]}"}
await verdict
# Bursts of 16 requests a rank: four full passes each.
timeout 150 python3 -m benchmarks.gpu.follow_verdict --url "${url_of[verdict]}" \
  --skew-file "$MOELB_BENCH_SKEW" --skews "$skews" --factor "${FACTOR:-1.0}" \
  --tokens "$((tokens / 4))" --requests "$((16 * num_gpus))" \
  --hardware "$(hardware "$num_gpus")" --commit "${COMMIT:-}" --out "$out/verdict.jsonl" \
  && code=0 || code=$?
curl -s "${url_of[verdict]}/moelb/status" > "$out/status-verdict.json"
grep -c 'sglang_moelb: verdict: ' "$out/server-verdict.log" || true
exit "$code"
