#!/usr/bin/env bash
# Stock against balanced prefill on GPUs of one host, on the same shapes, with imposed skew: one
# server after the other, with large passes (16,384 tokens a rank) and small ones (1,024). Needs
# SGLang, DeepEP and DeepGEMM importable.
#   NUM_GPUS=4 OUT=results bash benchmarks/gpu/run_prefill.sh
# SERVERS names which to run, in order. PARTS=1 also times our own functions in each pass. What the
# trace costs: SERVERS="observe-large-a traced-large observe-large-b"; TRACE_TOKENS=0 without tokens.
# Precision downgrade, with every token taken for vision: beside stock, beside copies that are kept
# (conversion for free), and beside fp8 for all experts. A skew may not exceed the number of GPUs.
#   NUM_GPUS=2 SKEWS=1,1.5,2 REQUESTS=32 REPEATS=3 OUT=results \
#     SERVERS="downgrade-large stock-large-a resident-large fp8-large" bash benchmarks/gpu/run_prefill.sh
# Replicas: SERVERS="stock-large-a replicate-large stock-large-b". With N GPUs, a hot rank of skew s
# gives away (s - 1) / s of its 128 / N experts to N - 1 ranks: SLOTS=8 is enough for skew 3 on 4
# GPUs; 2 GPUs need SLOTS=32 for skew 2, and 22 for 1.5.
set -euo pipefail
num_gpus=${NUM_GPUS:-4} out=${OUT:-results} repeats=${REPEATS:-4} port=${PORT:-31000}
servers=${SERVERS:-stock-large-a moelb-large stock-large-b stock-small-a moelb-small stock-small-b}
repo=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$out"
plugins=$(mktemp -d)
# Plugins are found by package metadata; lay it beside the checkout where pip cannot be used.
for name in sglang_moelb moelb_bench; do
  mkdir -p "$plugins/$name-0.1.0.dist-info"
  printf 'Metadata-Version: 2.1\nName: %s\nVersion: 0.1.0\n' "$name" > "$plugins/$name-0.1.0.dist-info/METADATA"
done
printf '[sglang.srt.plugins]\nmoelb = sglang_moelb.plugin:register\n' > "$plugins/sglang_moelb-0.1.0.dist-info/entry_points.txt"
printf '[sglang.srt.plugins]\nmoelb_bench = benchmarks.gpu.skew_plugin:register\nmoelb_bench_times = benchmarks.gpu.pass_times:register\n' > "$plugins/moelb_bench-0.1.0.dist-info/entry_points.txt"
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

serve() { # label, tokens a pass over all ranks, then flags
  local label=$1 tokens=$2
  shift 2
  export MOELB_BENCH_TIMES="$out/passes-$label.jsonl"
  unset MOELB_BENCH_VISION
  case $label in downgrade-* | resident-*) export MOELB_BENCH_VISION=1 ;; esac
  [ -z "${PARTS:-}" ] || export MOELB_BENCH_PARTS=1
  setsid python3 -m sglang.launch_server --model-path "$model" --load-format dummy \
    --skip-tokenizer-init --tp "$num_gpus" --ep "$num_gpus" --dp "$num_gpus" --enable-dp-attention \
    --moe-a2a-backend deepep --deepep-mode normal --moe-runner-backend deep_gemm \
    --deepep-dispatcher-output-dtype bf16 --attention-backend triton --sampling-backend pytorch \
    --grammar-backend none --disable-radix-cache --skip-server-warmup \
    --chunked-prefill-size "$tokens" --max-prefill-tokens "$tokens" --mem-fraction-static 0.6 \
    --host 127.0.0.1 --port "$port" "$@" > "$out/server-$label.log" 2>&1 &
  server=$!
  for _ in $(seq 300); do
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
bench() { # label, modes, then arguments
  local label=$1 modes=$2
  shift 2
  python3 -m benchmarks.gpu.bench_prefill --url "http://127.0.0.1:$port" --label "$label" \
    --modes "$modes" --skew-file "$MOELB_BENCH_SKEW" --hardware "$hardware" \
    --commit "${COMMIT:-}" --out "$out/prefill.jsonl" "$@"
}

for label in $servers; do
  flags=() modes=stock close=
  case $label in
    moelb-large) flags=(--moelb-mode observe)
      modes=${MODES:-none,observe,drop@1.0,drop@1.25,expand@1.0,expand@1.25} ;;
    downgrade-*) flags=(--moelb-mode downgrade) modes=${LOW_MODES:-none,downgrade@1.0} close=1 ;;
    replicate-*)
      flags=(--moelb-mode replicate --moelb-config "{\"replicate\": {\"slots\": ${SLOTS:-8}}}")
      modes=${REPLICATE_MODES:-none,observe,replicate} close=1 ;;
    resident-*)
      flags=(--moelb-mode downgrade --moelb-config '{"downgrade": {"resident_layers": "all"}}')
      modes=${LOW_MODES:-none,downgrade@1.0} close=1 ;;
    fp8-*) flags=(--quantization fp8 --deepep-dispatcher-output-dtype auto) ;;
    moelb-small) flags=(--moelb-mode observe) modes=${SMALL_MODES:-none,observe,drop@1.0} ;;
    observe-*) flags=(--moelb-mode observe) modes=observe ;;
    traced-*) modes=observe
      flags=(--moelb-mode observe --moelb-trace "$out/trace-$label"
        --moelb-trace-tokens "${TRACE_TOKENS:-16}") ;;
  esac
  case $label in
    *-large*) serve "$label" "$((16384 * num_gpus))" "${flags[@]}"
      bench "$label" "$modes" --skews "${SKEWS:-1,2,3}" --repeats "$repeats" \
        --requests "${REQUESTS:-64}" --identity "$out/identity-$label.json" ${close:+--closeness} ;;
    *-small*) serve "$label" "$((1024 * num_gpus))" "${flags[@]}"
      bench "$label" "$modes" --skews 1 --requests 64 --tokens 1024 --repeats "$((repeats * 3))" ;;
    *) echo "SERVERS: unknown server $label" >&2; exit 2 ;;
  esac
  case $label in
    moelb-* | traced-* | downgrade-* | replicate-* | resident-*)
      curl -s "http://127.0.0.1:$port/moelb/status" > "$out/status-$label.json" ;;
  esac
  stop
done
python3 -m benchmarks.gpu.compare_passes "$out"
