#!/usr/bin/env bash
# A prefill server with mode `replicate` and a decode server in mode `none` against one stock server,
# on GPUs of one host and the shapes of Qwen3-30B-A3B: the same requests to both, answers compared,
# as routed and under imposed skew. A check of what is answered, not of how fast. Needs SGLang, DeepEP,
# DeepGEMM and the transfer backend importable.
#   NUM_GPUS=1 NUM_RANKS=2 OUT=results bash benchmarks/gpu/run_disaggregated.sh
# BACKEND moves the KV cache: mooncake (over TCP, with copies through the host) or nixl (UCX_TLS says
# by what: GPU to GPU through cuda_ipc where that is allowed, with UCX_TLS=cuda_copy,sm,tcp through
# the host). Neither needs RDMA. PAIR_FLAGS are further flags of the pair, such as
# --disaggregation-enable-kv-checksum. SKEW is a load as in skew_plugin.py, MODES those of prefill.
# LAYERS, TOKENS (a long prompt), MAX_TOTAL (KV tokens) and MEM_FRACTION size the servers: with the
# values below three servers of two ranks share one GPU of 80 GB. BOOTSTRAP_PORT is where the roles meet.
LAYERS=${LAYERS:-4}
. "$(dirname "$0")/servers.sh"
num_gpus=${NUM_GPUS:?} backend=${BACKEND:-mooncake} tokens=${TOKENS:-2048}
lay_plugin moelb_bench moelb_bench=benchmarks.gpu.skew_plugin:register
export MOELB_BENCH_SKEW="$plugins/skew"
echo 0 > "$MOELB_BENCH_SKEW"
write_qwen3_moe "$plugins/model"
# A host without a network has no other address, and a failed transfer should end before the run does.
export SGLANG_HOST_IP=${SGLANG_HOST_IP:-127.0.0.1}
export SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT=${PAIR_TIMEOUT_S:-180}
export SGLANG_DISAGGREGATION_WAITING_TIMEOUT=${PAIR_TIMEOUT_S:-180}
pair=(--disaggregation-bootstrap-port "${BOOTSTRAP_PORT:-8998}")
case $backend in
  mooncake) export MC_FORCE_TCP=1; pair+=(--disaggregation-transfer-backend mooncake_tcp) ;;
  nixl) export UCX_TLS=${UCX_TLS:-cuda_ipc,cuda_copy,sm,tcp} UCX_NET_DEVICES=${UCX_NET_DEVICES:-lo}
    pair+=(--disaggregation-transfer-backend nixl) ;;
  *) echo "BACKEND=$backend: mooncake or nixl" >&2; exit 2 ;;
esac
read -ra further <<< "${PAIR_FLAGS:-}"
pair+=("${further[@]}")
common=(--model-path "$plugins/model" --load-format dummy --skip-tokenizer-init
  "${expert_parallel[@]}" --chunked-prefill-size "$((8192 * num_ranks))"
  --max-prefill-tokens "$((8192 * num_ranks))" --max-running-requests "$((32 * num_ranks))"
  --mem-fraction-static "${MEM_FRACTION:-0.9}" --max-total-tokens "${MAX_TOTAL:-40000}")

start unified "${common[@]}"
start prefill "${common[@]}" --disaggregation-mode prefill "${pair[@]}" --moelb-mode replicate \
  --moelb-config "{\"replicate\": {\"slots\": ${SLOTS:-16}}}"
# The memory for requests taken back is made when one is: SGLang's default reserves it at start.
start decode "${common[@]}" --disaggregation-mode decode "${pair[@]}" --moelb-mode none \
  --disaggregation-decode-retraction-backup cpu_tensor
await unified prefill decode
code=0
timeout "${ASK_TIMEOUT_S:-300}" python3 -m benchmarks.gpu.ask_disaggregated \
  --unified "${url_of[unified]}" --prefill "${url_of[prefill]}" --decode "${url_of[decode]}" \
  --bootstrap-port "${BOOTSTRAP_PORT:-8998}" --ranks "$num_ranks" --modes "${MODES:-none,replicate}" \
  --skew-file "$MOELB_BENCH_SKEW" --skew "${SKEW:-2 experts=16}" --tokens "$tokens" \
  --backend "$backend" --hardware "$(hardware "$num_gpus"), $num_ranks ranks a server" \
  --commit "${COMMIT:-}" --out "$out/disaggregated.jsonl" || code=$?
for role in prefill decode; do
  curl -s --max-time 10 "${url_of[$role]}/moelb/status" > "$out/status-$role.json" || true
done
if [[ $code != 0 ]]; then
  for role in prefill decode unified; do
    echo "--- server-$role.log" >&2
    grep -v server_args "$out/server-$role.log" | grep -iE "error|traceback|fail|warn|abort" |
      tail -15 | cut -c1-300 >&2 || true
  done
fi
exit "$code"
