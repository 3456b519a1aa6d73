#!/usr/bin/env bash
# Measures on a GPU and tests what only a GPU can: one command, under nine minutes, no network, no models.
#
#     benchmarks/gpu.sh               results in ${OUT:-benchmarks/results}
#     benchmarks/gpu.sh --dry         the same steps on the CPU with a miniature: proves the script, no numbers
#
# Needs torch, transformers, peft, accelerate and pytest; takes the rest from benchmarks/wheels/ if it is there
# (benchmarks/wheels.sh). A step that fails is recorded and the others go on; without a GPU nothing is measured.
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

say() { echo "$*" | tee -a "$out/steps.txt"; }

# step NAME SECONDS COMMAND...: runs it with its own limit, and never past the deadline of all.
step() {
    local name=$1 limit=$2 left began code
    shift 2
    left=$((deadline - $(date +%s)))
    if [ "$left" -lt 15 ]; then
        say "$name: left out, no time"
        return
    fi
    [ "$limit" -gt "$left" ] && limit=$left
    began=$(date +%s)
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
    code=$?
    say "$name: exit $code after $(($(date +%s) - began)) s"
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
    speed=(--accelerate channels_last=on) # nobody need wait for a compiler to see whether the script runs
    repeats=3
fi

# The method itself first, and with it the cold compile: if time runs out, the most telling numbers are there.
bench() { # NAME SECONDS RECIPE ARGUMENTS...
    step "$1" "$2" "${fastface[@]}" bench --recipe "$3" "${weights[@]}" -o "$out/$1" "${@:4}"
}
bench fastface 270 hyper-fastface --against reference "${speed[@]}" --repeats "$repeats"
step tests 90 "$python" -m pytest -q -p no:cacheprovider -m gpu tests/gpu --junitxml "$out/tests.xml"
bench am1 120 hyper-am1 --against reference "${speed[@]}" --repeats "$repeats" --no-cold
bench baseline 120 hyper-baseline --against reference "${speed[@]}" --repeats "$repeats" --no-cold
# Every item of speed turned off alone, without the compiler: each of its rows would be compiled anew.
bench ablation 90 hyper-fastface --ablation --accelerate channels_last=on --no-cold \
    --repeats $((repeats > 10 ? 10 : repeats))
# The memory that each level of saving takes, in a process of its own: what footprint.py can only count.
levels=(12 8 6)
for level in "${levels[@]}"; do
    bench "memory-$level" 60 hyper-fastface --low-memory "$level" --repeats 3
done

# Few files: one JSON for each step, and one page, one log and one list of tests for all.
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
