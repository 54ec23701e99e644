#!/usr/bin/env bash
# Decode of stock and of resident copies on GPUs of one host, on the shapes of Qwen3-30B-A3B: prefill
# in DeepEP's normal mode, decode in low latency in CUDA graphs. Servers are up side by side; bursts
# go to one at a time, in an order that is reversed every second repeat. Needs SGLang, DeepEP with
# NVSHMEM, and DeepGEMM importable.
#   NUM_GPUS=2 REQUESTS=64 REPEATS=6 OUT=results bash benchmarks/gpu/run_decode.sh stock resident
# SLOTS (4) are replicas of a rank and layer, of a made-up placement; low experts are stored in fp8
# (resident) or in 4 bits (mxfp4). About 20 GB of a GPU's memory a server, with MAX_TOTAL (100000)
# KV tokens. A rank decodes at most 64 requests at once, SGLang's graphs being captured for no more.
. "$(dirname "$0")/servers.sh"
num_gpus=${NUM_GPUS:?}
lay_plugin moelb_bench moelb_bench=benchmarks.gpu.skew_plugin:register # scales the dummy weights
export MOELB_BENCH_SKEW="$plugins/skew"
echo 0 > "$MOELB_BENCH_SKEW"
write_qwen3_moe "$plugins/model"
common=(--model-path "$plugins/model" --load-format dummy --skip-tokenizer-init
  "${expert_parallel[@]}" --deepep-mode auto --disable-prefill-cuda-graph
  --cuda-graph-max-bs-decode 64 --max-running-requests "$((64 * num_gpus))"
  --chunked-prefill-size "$((4096 * num_gpus))" --max-prefill-tokens "$((4096 * num_gpus))"
  --mem-fraction-static 0.85 --max-total-tokens "${MAX_TOTAL:-100000}")

servers=()
for kind in "${@:-stock}"; do
  case $kind in
    stock) flags=() ;;
    resident | mxfp4)
      python3 -m benchmarks.gpu.make_placement --model "$plugins/model" --ranks "$num_gpus" \
        --slots "${SLOTS:-4}" --format "${kind/resident/fp8}" --out "$out/placement-$kind.json"
      flags=(--moelb-mode none
        --moelb-config "{\"resident\": {\"placement\": \"$out/placement-$kind.json\"}}") ;;
    *) echo "$kind: unknown kind of server" >&2; exit 2 ;;
  esac
  start "$kind" "${common[@]}" "${flags[@]}"
  servers+=("--server=$kind=${url_of[$kind]}=stock")
done
await "${!url_of[@]}"
python3 -m benchmarks.gpu.bench_decode "${servers[@]}" --requests "${REQUESTS:-64}" \
  --tokens "${TOKENS:-64}" --new "${NEW:-128}" --repeats "${REPEATS:-6}" --warmups "${WARMUPS:-2}" \
  --hardware "$(hardware "$num_gpus")" --commit "${COMMIT:-}" --out "$out/decode.jsonl"
for kind in resident mxfp4; do
  [[ -z ${url_of[$kind]:-} ]] || curl -s "${url_of[$kind]}/moelb/status" > "$out/status-$kind.json"
done
grep -hi "resident placement\|cuda graph\|max_total_num_tokens" "$out"/server-*.log | cut -c1-200 || true
