#!/usr/bin/env bash
# Download to benchmarks/wheels/ the packages that a GPU machine without network may lack; benchmarks/gpu.sh
# installs them. The versions are those of constraints.txt.
#
#     benchmarks/wheels.sh            for Python 3.12 on x86-64 Linux
#     PYTHON_VERSION=3.11 benchmarks/wheels.sh
set -euo pipefail
cd "$(dirname "$0")/.."

packages="diffusers pydantic pydantic_core annotated-types typing-inspection typing_extensions
          platformdirs httpx2 httpcore2 cachetools importlib_metadata zipp nvidia-ml-py"

requirements=()
for name in $packages; do
    # Dashes and underscores in names are equivalent.
    line=$(grep -iE "^${name//[-_]/[-_]}==" constraints.txt) || { echo "constraints.txt has no $name" >&2; exit 1; }
    requirements+=("$line")
done
rm -rf benchmarks/wheels
"${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: --dest benchmarks/wheels \
    --python-version "${PYTHON_VERSION:-3.12}" --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    "${requirements[@]}"
du -sh benchmarks/wheels
