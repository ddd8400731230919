#!/usr/bin/env bash
# Everything that needs a card: correctness first, then speed. Each part has its own process and time limit; if one
# fails, the others still run. On the GPU machine, in a copy of this repository (docs/gpu.md):
#
#   bash benchmarks/gpu/run.sh                      all parts, in 8 minutes at most
#   ONLY="tests curve" bash benchmarks/gpu/run.sh   some of them
#   TOY=1 bash benchmarks/gpu/run.sh                on a CPU, interpreted, at toy size: only that all parts run
#
# PYTHON: interpreter. OUT: folder for gpu.json and log.txt. BUDGET: seconds for all parts. SCALE: factor of
# the limits. The exit status is 1 if a part failed, or was left out because no time was left.
set -u
cd "$(dirname "$0")/../.." || exit
PYTHON=${PYTHON:-python3} OUT=${OUT:-runs/gpu} TOY=${TOY:-0} BUDGET=${BUDGET:-470} SCALE=${SCALE:-1}
parts="environment tests curve attention rowwise trainer step profile tiles modernbert"
for name in ${ONLY:-}; do
    case " $parts " in *" $name "*) ;; *) echo "ONLY: unknown part $name; parts: $parts" >&2 && exit 2 ;; esac
done
"$PYTHON" -c "import torch" || { echo "PYTHON=$PYTHON does not run, or has no torch" >&2 && exit 2; }
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd) WORK=$(mktemp -d)
trap 'rm -r "$WORK"' EXIT
export TOY PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
: >"$OUT/log.txt"
rm -f "$OUT/gpu.json"

# part NAME SECONDS COMMAND...: the JSON that the command writes to $WORK/NAME becomes the entry NAME of $OUT/gpu.json.
part() {
    local name=$1 limit=$(($2 * SCALE)) left=$((BUDGET - SECONDS)) began=$SECONDS status
    shift 2
    case " ${ONLY:-$name} " in *" $name "*) ;; *) return ;; esac
    mkdir "$WORK/$name" && rm -f "$WORK/log"
    if [ "$left" -lt 15 ]; then
        status="no time" && echo "== $name: no time left" | tee -a "$OUT/log.txt"
    else
        echo "== $name: $*" | tee -a "$OUT/log.txt"
        # SIGINT, so that Python prints where it was.
        timeout --signal=INT --kill-after=10 $((limit < left ? limit : left)) "$@" >"$WORK/log" 2>&1
        status=$?
        cat "$WORK/log" >>"$OUT/log.txt"
        tail -n 25 "$WORK/log" | cut -c1-220
        echo "== $name: exit $status after $((SECONDS - began)) s, $SECONDS s in all" | tee -a "$OUT/log.txt"
    fi
    "$PYTHON" -m benchmarks.gpu.results keep "$OUT" "$WORK/$name" "$status" $((SECONDS - began)) "$WORK/log"
}

run() { part "$1" "$2" "$PYTHON" -m "${@:3}" --out "$WORK/$1"; }
has() { "$PYTHON" -c "import $1" 2>/dev/null; }

select=(-m "not slow") toy=() lengths=(--lengths 128 512 2048) rounds=(--rounds 6)
has xdist && select+=(-n 12)
has pytest_timeout && select+=(--timeout 100)
if [ "$TOY" = 1 ]; then
    export TRITON_INTERPRET=1 OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1 # the compiler takes minutes on a CPU
    select=(-m "not slow and not gpu" -k "large_scores or strided or never_synchronizes") toy=(--toy) lengths=() rounds=()
fi
step=(benchmarks.speed.step "${toy[@]}" "${lengths[@]}" "${rounds[@]}" --fill c4)

# What decides comes first. Limits are above what an H200 needed (docs/gpu.md), so that one slow part leaves time.
run environment 40 benchmarks.gpu.parts environment
part tests 100 env OMP_NUM_THREADS=1 "$PYTHON" -m pytest -p no:cacheprovider "${select[@]}" -vv --durations=10 \
    tests/model/test_{gpu,attention,cross_entropy_triton,flash_attn_triton,fused_kernels,layer_norm_triton,geglu_triton,kernels,masked_lm_loss}.py
run curve 80 benchmarks.gpu.parts curve
run attention 90 benchmarks.kernels.compare "${toy[@]}" "${rounds[@]}" --cases attention
run rowwise 70 benchmarks.kernels.compare "${toy[@]}" "${rounds[@]}" --cases head geglu layer_norm
if [ -d .gpu/mds ]; then
    run trainer 110 benchmarks.gpu.parts trainer
fi
run step 80 "${step[@]}" --arms hf_bert hf_strong
run profile 40 benchmarks.gpu.parts profile
run tiles 50 benchmarks.kernels.tune "${toy[@]}" --head_sizes 64
run modernbert 60 "${step[@]}" --arms modernbert --lengths 512
"$PYTHON" -m benchmarks.gpu.results summary "$OUT" | tee -a "$OUT/log.txt"
exit "${PIPESTATUS[0]}"
