# Sourced by the benchmarks beside it: servers side by side on the GPUs of one host, each on its own
# port, with the plugins found where pip cannot be used. Reads NUM_GPUS, OUT and PORT. With NUM_RANKS
# more than NUM_GPUS ranks share GPUs: for checks, not for times (shared_gpus.py).
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
out=${OUT:-results} next_port=${PORT:-21000}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$repo"
declare -A pid_of=() url_of=()

plugins=$(mktemp -d)
lay_plugin() { # distribution, then NAME=MODULE:FUNCTION of group sglang.srt.plugins
  local folder=$plugins/$1-0.1.0.dist-info
  mkdir -p "$folder"
  printf 'Metadata-Version: 2.1\nName: %s\nVersion: 0.1.0\n' "$1" > "$folder/METADATA"
  { echo '[sglang.srt.plugins]'; printf '%s\n' "${@:2}"; } > "$folder/entry_points.txt"
}
lay_plugin sglang_moelb moelb=sglang_moelb.plugin:register
export PYTHONPATH="$plugins:$repo:${PYTHONPATH:-}"
num_ranks=${NUM_RANKS:-${NUM_GPUS:-1}}
if [ "$num_ranks" -gt "${NUM_GPUS:-1}" ]; then
  lay_plugin moelb_share moelb_share=benchmarks.gpu.shared_gpus:register
  export MOELB_BENCH_SHARE_GPUS=1 NCCL_MULTI_RANK_GPU_ENABLE=1 TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1
fi
# A server that starts beside others finds less memory free on one GPU than on the next.
export SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK=0

hardware() { echo "$1 x $(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)"; }

start() { # label, then flags; returns at once
  local label=$1
  shift
  url_of[$label]=http://127.0.0.1:$next_port
  setsid python3 -m sglang.launch_server --host 127.0.0.1 --port "$next_port" --skip-server-warmup \
    --attention-backend triton --sampling-backend pytorch --grammar-backend none \
    --disable-radix-cache "$@" > "$out/server-$label.log" 2>&1 &
  pid_of[$label]=$!
  next_port=$((next_port + 1000)) # SGLang takes further ports above the one it is given
}

await() { # labels; ends this process where one does not come up
  local label
  for label in "$@"; do
    for _ in $(seq 300); do
      curl -sf "${url_of[$label]}/health" > /dev/null && continue 2
      kill -0 "${pid_of[$label]}" 2> /dev/null || break
      sleep 1
    done
    echo "server $label did not come up:" >&2
    grep -v server_args "$out/server-$label.log" | tail -40 | cut -c1-300 >&2
    exit 1
  done
}

stop_servers() {
  local label
  for label in "${!pid_of[@]}"; do
    kill -9 -- "-${pid_of[$label]}" 2> /dev/null || true
    wait "${pid_of[$label]}" 2> /dev/null || true
  done
  pid_of=()
}
trap stop_servers EXIT

# Expert parallel over DeepEP, one data-parallel attention rank each.
expert_parallel=(--tp "$num_ranks" --ep "$num_ranks" --dp "$num_ranks"
  --enable-dp-attention --moe-a2a-backend deepep --deepep-mode normal
  --moe-runner-backend deep_gemm --deepep-dispatcher-output-dtype bf16)

write_qwen3_moe() { # folder: Qwen3-30B-A3B with LAYERS (12) layers; weights are SGLang's dummies
  mkdir -p "$1"
  cat > "$1/config.json" <<JSON
{"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": false,
 "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "decoder_sparse_step": 1,
 "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
 "intermediate_size": 6144, "max_position_embeddings": 40960, "mlp_only_layers": [],
 "moe_intermediate_size": 768, "norm_topk_prob": true, "num_attention_heads": 32,
 "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": ${LAYERS:-12}, "num_key_value_heads": 4,
 "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
 "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 151936}
JSON
}
