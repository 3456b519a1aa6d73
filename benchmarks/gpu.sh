#!/usr/bin/env bash
# Run the GPU tests and GPU benchmarks, without network and model files.
#
#     benchmarks/gpu.sh [PART...]     parts: tests eager memory compiled; results in ${OUT:-benchmarks/results}
#     benchmarks/gpu.sh --dry         the same steps on the CPU with a miniature, to test this script
#
# On an H200 with 16 slow CPU cores, tests, eager and memory take four minutes. Compilation had not finished one
# graph of full size after five minutes there: give it its own run. A part that fails does not stop the others.
# Requires torch, transformers, peft, accelerate and pytest; installs the rest from benchmarks/wheels/ if it
# exists (see benchmarks/wheels.sh). Without a GPU nothing is measured.
set -uo pipefail
cd "$(dirname "$0")/.."

out=${OUT:-benchmarks/results}
python=${PYTHON:-python3}
small=""
if [ "${1:-}" = --dry ]; then
    small=--small
    shift
elif ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "there is no CUDA device here: nothing was measured"
    exit 0
fi
[ $# -gt 0 ] || set -- tests eager memory compiled
mkdir -p "$out"
out=$(cd "$out" && pwd)

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
export PYTHONPATH="$site:$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export FASTFACE_HOME=${FASTFACE_HOME:-$site/home}
if [ -z "$small" ] && compgen -G 'benchmarks/wheels/*.whl' >/dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target "$site" benchmarks/wheels/*.whl
fi

# run NAME SECONDS COMMAND...: one part with its own time limit.
run() {
    local name=$1 limit=$2 began
    shift 2
    began=$(date +%s)
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.txt" 2>&1
    echo "$name: exit $? after $(($(date +%s) - began)) s" | tee -a "$out/$name.txt"
}

for part in "$@"; do
    case $part in
        tests) run tests 180 "$python" -m pytest -v -p no:cacheprovider -m gpu tests/gpu -k "not compile" ;;
        eager) run eager-rows 240 "$python" benchmarks/ladder.py eager $small --out "$out" --seconds 220 ;;
        memory) run memory 180 "$python" benchmarks/memory.py $small ;;
        compiled) run compiled-rows 1800 "$python" benchmarks/ladder.py compiled $small --out "$out" --seconds 1500 ;;
        *) echo "unknown part: $part" && exit 2 ;;
    esac
done
cat "$out"/*.txt
