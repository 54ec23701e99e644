#!/usr/bin/env bash
# Does the verdict of a live server tell what following it brings? One server on GPUs of one host,
# the shapes of run_prefill.sh, imposed skews. Needs SGLang, DeepEP and DeepGEMM importable.
#   NUM_GPUS=2 OUT=results bash benchmarks/gpu/run_verdict.sh
# Under 150 seconds after the server is up. On R ranks no skew above R can be imposed.
set -euo pipefail
num_gpus=${NUM_GPUS:-2} out=${OUT:-results} port=${PORT:-31000} tokens_per_rank=${TOKENS:-16384}
skews=${SKEWS:-$([ "$num_gpus" -ge 4 ] && echo 1,2,3 || echo 1,1.5,2)}
repo=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$out"
plugins=$(mktemp -d)
# Plugins are found by package metadata; lay it beside the checkout where pip cannot be used.
for name in sglang_moelb moelb_bench; do
  mkdir -p "$plugins/$name-0.1.0.dist-info"
  printf 'Metadata-Version: 2.1\nName: %s\nVersion: 0.1.0\n' "$name" > "$plugins/$name-0.1.0.dist-info/METADATA"
done
printf '[sglang.srt.plugins]\nmoelb = sglang_moelb.plugin:register\n' > "$plugins/sglang_moelb-0.1.0.dist-info/entry_points.txt"
printf '[sglang.srt.plugins]\nmoelb_bench = benchmarks.gpu.skew_plugin:register\n' > "$plugins/moelb_bench-0.1.0.dist-info/entry_points.txt"
export PYTHONPATH="$plugins:$repo:${PYTHONPATH:-}"
export MOELB_BENCH_SKEW="$plugins/skew"
echo 0 > "$MOELB_BENCH_SKEW"

model="$plugins/model"
mkdir -p "$model"
# The configuration of the model in run_prefill.sh: Qwen3-30B-A3B with 12 layers.
sed -n '/JSON.$/,/^JSON$/p' "$repo/benchmarks/gpu/run_prefill.sh" | sed '1d;$d' > "$model/config.json"

all_tokens=$((tokens_per_rank * num_gpus))
setsid python3 -m sglang.launch_server --model-path "$model" --load-format dummy \
  --skip-tokenizer-init --tp "$num_gpus" --ep "$num_gpus" --dp "$num_gpus" --enable-dp-attention \
  --moe-a2a-backend deepep --deepep-mode normal --moe-runner-backend deep_gemm \
  --deepep-dispatcher-output-dtype bf16 --attention-backend triton --sampling-backend pytorch \
  --grammar-backend none --disable-radix-cache --skip-server-warmup \
  --chunked-prefill-size "$all_tokens" --max-prefill-tokens "$all_tokens" \
  --mem-fraction-static 0.6 --host 127.0.0.1 --port "$port" \
  --moelb-mode observe --moelb-verdict > "$out/server-verdict.log" 2>&1 &
server=$!
stop() { kill -9 -- "-$server" 2> /dev/null || true; wait "$server" 2> /dev/null || true; }
trap stop EXIT
for _ in $(seq 180); do
  curl -sf "http://127.0.0.1:$port/health" > /dev/null && up=1 && break
  kill -0 "$server" 2> /dev/null || break
  sleep 1
done
[ -n "${up:-}" ] || { tail -40 "$out/server-verdict.log"; exit 1; }

# Bursts of 16 requests a rank: four full passes each.
timeout 150 python3 -m benchmarks.gpu.follow_verdict --url "http://127.0.0.1:$port" \
  --skew-file "$MOELB_BENCH_SKEW" --skews "$skews" --factor "${FACTOR:-1.0}" \
  --tokens "$((tokens_per_rank / 4))" --requests "$((16 * num_gpus))" \
  --hardware "$num_gpus x $(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)" \
  --commit "${COMMIT:-}" --out "$out/verdict.jsonl" && code=0 || code=$?
curl -s "http://127.0.0.1:$port/moelb/status" > "$out/status-verdict.json"
grep -c 'sglang_moelb: verdict: ' "$out/server-verdict.log" || true
exit "$code"
