#!/usr/bin/env bash
# Run the GPU benchmarks and GPU tests: under nine minutes, without network and model files.
#
#     benchmarks/gpu.sh               results in ${OUT:-benchmarks/results}
#     benchmarks/gpu.sh --dry         the same steps on the CPU with a miniature, to test this script
#
# Requires torch, transformers, peft, accelerate and pytest; installs the rest from benchmarks/wheels/ if it exists
# (see benchmarks/wheels.sh). A failed step is recorded and the next one runs. Without a GPU nothing is measured.
set -uo pipefail
cd "$(dirname "$0")/.."

out=${OUT:-benchmarks/results}
python=${PYTHON:-python3}
deadline=$(($(date +%s) + 520))
dry=""
[ "${1:-}" = --dry ] && dry=1

if [ -z "$dry" ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "there is no CUDA device here: nothing was measured"
    exit 0
fi
mkdir -p "$out"
out=$(cd "$out" && pwd)
: >"$out/steps.txt"

record() { echo "$*" | tee -a "$out/steps.txt"; }

# step NAME SECONDS COMMAND...: run a command with its own time limit, but never past the overall deadline.
step() {
    local name=$1 limit=$2 left began code
    shift 2
    left=$((deadline - $(date +%s)))
    if [ "$left" -lt 15 ]; then
        record "$name: skipped, no time left"
        return
    fi
    [ "$limit" -gt "$left" ] && limit=$left
    began=$(date +%s)
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
    code=$?
    record "$name: exit $code after $(($(date +%s) - began)) s"
    [ "$code" -ne 0 ] && tail -n 15 "$out/$name.log"
}

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
export PYTHONPATH="$site:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export FASTFACE_HOME=${FASTFACE_HOME:-$site/home}

if [ -z "$dry" ] && compgen -G 'benchmarks/wheels/*.whl' >/dev/null; then
    step install 60 "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target "$site" benchmarks/wheels/*.whl
fi

fastface=("$python" -c 'from fastface_cli.cli import main; main()')
weights=(--weights random)
speed=(--compile --accelerate channels_last=on)
repeats=50
if [ -n "$dry" ]; then
    weights=(--weights random-small --set sampling.width=128 --set sampling.height=128 --device cpu --dtype bfloat16)
    speed=(--accelerate channels_last=on) # testing the script needs no compilation
    repeats=3
fi

# FastFace first, with the cold compilation: if time runs out, the most important results exist.
bench() { # NAME SECONDS RECIPE ARGUMENTS...
    step "$1" "$2" "${fastface[@]}" bench --recipe "$3" "${weights[@]}" -o "$out/$1" "${@:4}"
}
bench fastface 270 hyper-fastface --against reference "${speed[@]}" --repeats "$repeats"
step tests 90 "$python" -m pytest -q -p no:cacheprovider -m gpu tests/gpu --junitxml "$out/tests.xml"
bench am1 120 hyper-am1 --against reference "${speed[@]}" --repeats "$repeats" --no-cold
bench baseline 120 hyper-baseline --against reference "${speed[@]}" --repeats "$repeats" --no-cold
# Disable each optimization in turn; without --compile, which would compile every row again.
bench ablation 90 hyper-fastface --ablation --accelerate channels_last=on --no-cold \
    --repeats $((repeats > 10 ? 10 : repeats))
# Measure the memory of each --low-memory level in a new process; footprint.py only counts it.
levels=(12 8 6)
for level in "${levels[@]}"; do
    bench "memory-$level" 60 hyper-fastface --low-memory "$level" --repeats 3
done

# Keep few files: one JSON per step, one page of results, one log and one list of tests.
: >"$out/results.md"
: >"$out/log.txt"
for name in install fastface tests am1 baseline ablation "${levels[@]/#/memory-}"; do
    if [ -f "$out/$name/bench.md" ]; then
        mv "$out/$name/bench.json" "$out/$name.json"
        cat "$out/$name/bench.md" >>"$out/results.md"
        echo >>"$out/results.md"
        rm -r "${out:?}/$name"
    fi
    if [ -f "$out/$name.log" ]; then
        { echo "=== $name"; cat "$out/$name.log"; } >>"$out/log.txt"
        rm "$out/$name.log"
    fi
done
{ echo "# Steps"; echo; sed 's/^/- /' "$out/steps.txt"; } >>"$out/results.md"
rm "$out/steps.txt"
cat "$out/results.md"
exit 0
