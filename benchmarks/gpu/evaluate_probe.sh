#!/usr/bin/env bash
# Serve the probe on GPUs of this host and ask it the published test items. Needs SGLang importable.
#   NUM_GPUS=1 OUT=results bash benchmarks/gpu/evaluate_probe.sh
# One GPU: stock SGLang without expert parallelism. More: expert parallel over DeepEP, stock, and
# with the flags of MOELB, if given, compared with stock answer by answer:
#   NUM_GPUS=2 MOELB="--moelb-mode downgrade" bash benchmarks/gpu/evaluate_probe.sh
# MODEL, ITEMS (2,000), SEED (0), CONCURRENCY (128) and PORT can be set.
set -euo pipefail
num_gpus=${NUM_GPUS:-1} out=${OUT:-results} items=${ITEMS:-2000} seed=${SEED:-0} port=${PORT:-31000}
repo=$(cd "$(dirname "$0")/../.." && pwd)
model=${MODEL:-$repo/benchmarks/probe/checkpoint}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$repo"
plugins=$(mktemp -d)
mkdir -p "$plugins/sglang_moelb-0.1.0.dist-info"
printf 'Metadata-Version: 2.1\nName: sglang_moelb\nVersion: 0.1.0\n' > "$plugins/sglang_moelb-0.1.0.dist-info/METADATA"
printf '[sglang.srt.plugins]\nmoelb = sglang_moelb.plugin:register\n' > "$plugins/sglang_moelb-0.1.0.dist-info/entry_points.txt"
export PYTHONPATH="$plugins:$repo:${PYTHONPATH:-}"

ranks=()
if [ "$num_gpus" -gt 1 ]; then
  ranks=(--tp "$num_gpus" --ep "$num_gpus" --dp "$num_gpus" --enable-dp-attention
    --moe-a2a-backend deepep --deepep-mode normal --moe-runner-backend deep_gemm
    --deepep-dispatcher-output-dtype bf16)
fi
serve() { # label, then flags
  local label=$1
  shift
  setsid python3 -m sglang.launch_server --model-path "$model" "${ranks[@]}" \
    --attention-backend triton --mm-attention-backend triton_attn --sampling-backend pytorch \
    --grammar-backend none --dtype bfloat16 --disable-radix-cache --context-length 4096 \
    --mem-fraction-static 0.3 --host 127.0.0.1 --port "$port" "$@" > "$out/server-$label.log" 2>&1 &
  server=$!
  for _ in $(seq 240); do
    curl -sf "http://127.0.0.1:$port/health" > /dev/null && return
    kill -0 "$server" 2> /dev/null || break
    sleep 1
  done
  tail -40 "$out/server-$label.log"
  exit 1
}
server=
stop() {
  [ -z "$server" ] || kill -9 -- "-$server" 2> /dev/null || true
  server=
}
trap stop EXIT
evaluate() { # label, items, then flags; the answer to "how long" is in the result
  local label=$1 num=$2
  shift 2
  python3 -m benchmarks.probe.evaluate --url "http://127.0.0.1:$port" --items "$num" --seed "$seed" \
    --concurrency "${CONCURRENCY:-128}" --out "$out/evaluation-$label.json" "$@"
}

serve "stock-$num_gpus"
evaluate "warmup-$num_gpus" 300 > /dev/null # kernels are compiled at their first use
evaluate "stock-$num_gpus" "$items"
stop
if [ -n "${MOELB:-}" ]; then
  read -r -a flags <<< "$MOELB"
  serve "moelb-$num_gpus" "${flags[@]}"
  evaluate "warmup-$num_gpus" 300 > /dev/null
  evaluate "moelb-$num_gpus" "$items" --reference "$out/evaluation-stock-$num_gpus.json"
  curl -s "http://127.0.0.1:$port/moelb/status" > "$out/status-moelb-$num_gpus.json"
fi
