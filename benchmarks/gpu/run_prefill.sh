#!/usr/bin/env bash
# Stock against balanced prefill on GPUs of one host, on the shapes of Qwen3-30B-A3B, with imposed
# skew. All servers of a run are up side by side; bursts go to one at a time, in an order that is
# reversed every second repeat. Needs SGLang, DeepEP and DeepGEMM importable.
#   NUM_GPUS=2 SIZE=large SKEWS=1,1.5,2 REQUESTS=32 REPEATS=4 OUT=results \
#     bash benchmarks/gpu/run_prefill.sh stock moelb=none,observe,drop@1.0
# A skew is a load as in skew_plugin.py: "1,2,2 moving", "2 still experts=8".
# An argument is KIND=MODES, modes such as drop@1.25 or downgrade:experts@1.0; kinds are below. A
# skew may not exceed the number of GPUs. SIZE is large (16,384 tokens a rank and pass) or small
# (1,024). PARTS=1 also times our own functions in each pass. About 20 GB of a GPU's memory a server.
# What the trace costs: observe traced, with TRACE_TOKENS=0 for a trace without tokens. A server
# `verdict` keeps score; when all is measured its verdict is read at each skew, followed and checked.
# Downgrade, every token taken for vision: stock downgrade resident fp8; resident keeps low-precision
# copies (conversion for free), fp8 runs all experts so. Replicas: stock replicate. With N GPUs, a hot
# rank of skew s gives away (s - 1) / s of its 128 / N experts to N - 1 ranks: SLOTS=8 is enough for
# skew 3 on 4 GPUs; 2 GPUs need SLOTS=32 for skew 2, and 22 for 1.5.
# SGLang's EPLB: stock eplb replicate. REDUNDANT experts in all (6, on 2 GPUs 324 MiB a rank with 12
# layers; SLOTS=32 are 288 MiB), rebalanced every REBALANCE passes; before each measured burst it
# learns the load, or another with "eplb=eplb,eplb@2 opposite experts=8". Two ranks that share out
# hot and cold experts evenly are balanced for the opposite load too: for a history that does not
# match take experts=8 on both sides. Resident copies: stock copies, COPIES (4) replicas a rank and
# layer for the load PLACED ("2 still experts=8") in FORMAT (fp8, mxfp4), split evenly and by quota.
# WARMUPS bursts of each are not counted, REQUESTS=32 are 4 passes on 2 GPUs; LAYERS, MAX_TOTAL (KV tokens) and
# MEM_FRACTION (0.85) size the servers.
. "$(dirname "$0")/servers.sh"
num_gpus=${NUM_GPUS:?} size=${SIZE:-large} repeats=${REPEATS:-4}
lay_plugin moelb_bench moelb_bench=benchmarks.gpu.skew_plugin:register \
  moelb_bench_times=benchmarks.gpu.pass_times:register
export MOELB_BENCH_SKEW="$plugins/skew"
echo 0 > "$MOELB_BENCH_SKEW"
write_qwen3_moe "$plugins/model"
case $size in
  large) tokens=16384 requests=${REQUESTS:-64} length=4096 ;;
  small) tokens=1024 requests=${REQUESTS:-64} length=1024 ;;
  *) echo "SIZE=$size: large or small" >&2; exit 2 ;;
esac
common=(--model-path "$plugins/model" --load-format dummy --skip-tokenizer-init
  "${expert_parallel[@]}" --chunked-prefill-size "$((tokens * num_ranks))"
  --max-prefill-tokens "$((tokens * num_ranks))" --mem-fraction-static "${MEM_FRACTION:-0.85}"
  --max-total-tokens "${MAX_TOTAL:-100000}")

servers=()
for asked in "${@:-stock}"; do
  kind=${asked%%=*} flags=() vision= modes=stock
  case $kind in
    stock*) ;;
    moelb) flags=(--moelb-mode observe) modes=none,observe ;;
    observe) flags=(--moelb-mode observe) modes=observe ;;
    traced) modes=observe
      flags=(--moelb-mode observe --moelb-trace "$plugins/trace" --moelb-trace-tokens "${TRACE_TOKENS:-16}") ;;
    verdict) flags=(--moelb-mode observe --moelb-verdict) modes=observe ;;
    replicate) modes=none,replicate
      flags=(--moelb-mode replicate --moelb-config "{\"replicate\": {\"slots\": ${SLOTS:-8}}}") ;;
    downgrade) flags=(--moelb-mode downgrade) vision=1 modes=none,downgrade@1.0 ;;
    resident) vision=1 modes=downgrade@1.0
      flags=(--moelb-mode downgrade --moelb-config '{"downgrade": {"resident_layers": "all"}}') ;;
    copies) modes=none:even,none:quota
      python3 -m benchmarks.gpu.make_placement --model "$plugins/model" --ranks "$num_ranks" \
        --slots "${COPIES:-4}" --format "${FORMAT:-fp8}" \
        --load "${PLACED:-2 still experts=8}" --out "$out/placement.json"
      flags=(--moelb-mode none --moelb-config "{\"resident\": {\"placement\": \"$out/placement.json\",
        \"recalibrate\": true, \"move_ms\": 0, \"window_passes\": 8, \"split\": \"quota\"}}") ;;
    eplb) modes=eplb
      flags=(--enable-eplb --ep-num-redundant-experts "${REDUNDANT:-6}"
        --eplb-rebalance-num-iterations "${REBALANCE:-16}") ;;
    fp8) flags=(--quantization fp8 --deepep-dispatcher-output-dtype auto) ;;
    *) echo "$asked: unknown kind of server" >&2; exit 2 ;;
  esac
  [[ $asked != *=* ]] || modes=${asked#*=}
  MOELB_BENCH_TIMES="$out/passes-$kind-$size.jsonl" MOELB_BENCH_PARTS=${PARTS:-} \
    MOELB_BENCH_VISION=$vision start "$kind" "${common[@]}" "${flags[@]}"
  servers+=("$kind=${url_of[$kind]}=$modes")
done
await "${!url_of[@]}"
python3 -m benchmarks.gpu.bench_prefill "${servers[@]/#/--server=}" --skew-file "$MOELB_BENCH_SKEW" \
  --skews "${SKEWS:-1}" --repeats "$repeats" --warmups "${WARMUPS:-2}" --logs "$out" --requests "$requests" --tokens "$length" \
  --hardware "$(hardware "$num_gpus")" --commit "${COMMIT:-}" --outputs "$out/outputs-$size.json" \
  --out "$out/prefill-$size.jsonl"
code=0
[[ -z ${url_of[verdict]:-} ]] || timeout 300 python3 -m benchmarks.gpu.follow_verdict \
  --url "${url_of[verdict]}" --skew-file "$MOELB_BENCH_SKEW" --skews "${SKEWS:-1}" \
  --factor "${FACTOR:-1.0}" --tokens "$length" --requests "$((16 * num_gpus))" \
  --hardware "$(hardware "$num_gpus")" --commit "${COMMIT:-}" --out "$out/verdict.jsonl" || code=$?
for one in "${servers[@]}"; do
  [[ $one == *=stock || $one == *=eplb* ]] || { IFS='=' read -r kind url _ <<< "$one"
    curl -s "$url/moelb/status" > "$out/status-$kind-$size.json"; }
done
python3 -m benchmarks.gpu.compare_passes "$out"
exit "$code"
