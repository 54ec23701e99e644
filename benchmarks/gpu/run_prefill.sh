#!/usr/bin/env bash
# Stock against balanced prefill on GPUs of one host: stock, balanced, stock again, one after the
# other, on the same shapes, with imposed skew. Needs SGLang, DeepEP and DeepGEMM importable.
#   NUM_GPUS=4 OUT=results bash benchmarks/gpu/run_prefill.sh
set -euo pipefail
num_gpus=${NUM_GPUS:-4} out=${OUT:-results} repeats=${REPEATS:-4} port=${PORT:-31000}
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
cat > "$model/config.json" <<'JSON'
{"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": false,
 "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "decoder_sparse_step": 1,
 "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
 "intermediate_size": 6144, "max_position_embeddings": 40960, "mlp_only_layers": [],
 "moe_intermediate_size": 768, "norm_topk_prob": true, "num_attention_heads": 32,
 "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 12, "num_key_value_heads": 4,
 "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
 "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 151936}
JSON

serve() { # label, then flags
  local label=$1
  shift
  setsid python3 -m sglang.launch_server --model-path "$model" --load-format dummy \
    --skip-tokenizer-init --tp "$num_gpus" --ep "$num_gpus" --dp "$num_gpus" --enable-dp-attention \
    --moe-a2a-backend deepep --deepep-mode normal --moe-runner-backend deep_gemm \
    --deepep-dispatcher-output-dtype bf16 --attention-backend triton --sampling-backend pytorch \
    --grammar-backend none --disable-radix-cache --skip-server-warmup \
    --chunked-prefill-size 65536 --max-prefill-tokens 65536 --mem-fraction-static 0.6 \
    --host 127.0.0.1 --port "$port" "$@" > "$out/server-$label.log" 2>&1 &
  server=$!
  for _ in $(seq 180); do
    curl -sf "http://127.0.0.1:$port/health" > /dev/null && return
    kill -0 "$server" 2> /dev/null || { tail -40 "$out/server-$label.log"; exit 1; }
    sleep 1
  done
  tail -40 "$out/server-$label.log"
  exit 1
}
stop() { kill -9 -- "-$server" 2> /dev/null || true; wait "$server" 2> /dev/null || true; sleep 3; }
trap stop EXIT
hardware="$num_gpus x $(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)"
bench() { # label, modes of the large bursts, modes of the small ones
  local common=(--url "http://127.0.0.1:$port" --label "$1" --skew-file "$MOELB_BENCH_SKEW"
    --hardware "$hardware" --commit "${COMMIT:-}" --out "$out/prefill.jsonl")
  python3 -m benchmarks.gpu.bench_prefill "${common[@]}" --skews "${SKEWS:-1,2,3}" --modes "$2" \
    --repeats "$repeats" --identity "$out/identity-$1.json"
  python3 -m benchmarks.gpu.bench_prefill "${common[@]}" --skews 1 --modes "$3" \
    --requests "$num_gpus" --tokens 1024 --repeats "$((repeats * 8))"
}

serve stock-a && bench stock-a stock stock && stop
serve moelb --moelb-mode observe
bench moelb "${MODES:-none,observe,drop@1.0,drop@1.25,expand@1.0,expand@1.25}" none,observe
curl -s "http://127.0.0.1:$port/moelb/status" > "$out/status.json"
stop
serve stock-b && bench stock-b stock stock && stop
python3 - "$out" <<'PY'
import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
a, b, m = (json.loads((out / f"identity-{n}.json").read_text()) for n in ("stock-a", "stock-b", "moelb"))
print("stock against stock:", "bit-identical" if a == b else "different")
print("observe against stock:", "bit-identical" if a == m else "different")
PY
