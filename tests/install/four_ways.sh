#!/usr/bin/env bash
# Install fastface in clean environments in the documented ways, and generate an image with each.
#
#   tests/install/four_ways.sh FOLDER [wheel] [sdist] [pipx] [uv]     all four by default
#
# FOLDER contains the environments (about 3 GB each; uv also downloads PyTorch's CUDA build, 8 GB on disk).
# wheel, sdist and pipx use the versions of constraints.txt; uv uses the newest versions, like a user would.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mkdir -p "$1" && cd "$1" && pwd)
shift
ways=("$@")
[ ${#ways[@]} -gt 0 ] || ways=(wheel sdist pipx uv)
python=${PYTHON:-python3.11}

unset PYTHONPATH PYTHONHOME VIRTUAL_ENV
export FASTFACE_HOME=$work/home HF_HUB_OFFLINE=1 NO_COLOR=1
export CC=/bin/false CXX=/bin/false  # no package may require a compiler
export PIPX_HOME=$work/pipx PIPX_BIN_DIR=$work/pipx/bin PIPX_MAN_DIR=$work/pipx/man
export UV_TOOL_DIR=$work/uv UV_TOOL_BIN_DIR=$work/uv/bin UV_PYTHON_DOWNLOADS=never
export UV_CACHE_DIR=${UV_CACHE_DIR:-$work/uv-cache}

print_title() { printf '\n== %s\n' "$*"; }

prepare() {
    "$python" -m venv "$work/tools"
    "$work/tools/bin/pip" install --quiet build pipx uv
    "$work/tools/bin/python" -m build --outdir "$work/dist" "$root" >"$work/build.log" 2>&1 ||
        { tail -20 "$work/build.log"; exit 1; }
    ls -l "$work/dist"
}

into_venv() {  # name, archive
    "$python" -m venv "$work/$1"
    "$work/$1/bin/pip" install --quiet --constraint "$root/constraints.txt" "$2"
    check "$1" "$work/$1/bin/fastface"
}

check() {  # name, command
    mkdir -p "$work/run/$1"
    cd "$work/run/$1"  # outside the checkout, so that nothing is imported from it
    "$2" --version
    "$2" recipes list --json | grep --only-matching --max-count 1 'hyper-fastface"' >/dev/null
    "$2" licenses --recipe hyper-fastface >licenses.txt
    "$2" generate --recipe pocket --face "$root/examples/portrait.png" --prompt "watercolour; a smiling woman" \
        --seed 3 --output "$1.png" --json
    test -s "$1.png"
    "$2" doctor --recipe pocket
}

prepare
for way in "${ways[@]}"; do
    print_title "$way"
    began=$SECONDS
    case $way in
        wheel) into_venv wheel "$work"/dist/*.whl ;;
        sdist) into_venv sdist "$work"/dist/*.tar.gz ;;
        pipx)
            "$work/tools/bin/pipx" install --quiet --python "$python" \
                --pip-args "--constraint $root/constraints.txt" "$root"
            check pipx "$work/pipx/bin/fastface"
            ;;
        uv)
            "$work/tools/bin/uv" tool install --quiet --python "$python" "$root"
            check uv "$work/uv/bin/fastface"
            ;;
        *) echo "unknown way: $way" >&2; exit 2 ;;
    esac
    echo "$way: works ($((SECONDS - began)) s)"
done
