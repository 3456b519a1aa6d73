"""Count the GPU memory of each `--low-memory` level at the published size; no GPU is needed.

    python benchmarks/footprint.py [--recipe hyper-fastface] [--size 1024]

GiB in half precision, one image, by stage. CUDA context, workspaces and fragmentation are not included.
"""

from __future__ import annotations

import argparse

from fastface_cli.benchmark.footprint import count
from fastface_cli.models.offload import GIB, LEVELS
from fastface_cli.recipe.files import load_recipe

STAGES = ("text", "identity", "keys", "step", "vae")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--recipe", default="hyper-fastface")
    parser.add_argument("--size", type=int, default=1024)
    options = parser.parse_args()
    size = [f"sampling.width={options.size}", f"sampling.height={options.size}"]
    recipe = load_recipe(options.recipe, overrides=size).recipe
    print(f"| --low-memory | between images | {' | '.join(STAGES)} | peak |")
    print("|---|---|" + "---|" * len(STAGES) + "---|")
    for name, level in LEVELS.items():
        footprint = count(recipe, level)
        cells = [footprint.resident, *(footprint.stages.get(stage, 0) for stage in STAGES), footprint.peak]
        print(
            f"| {name} | {' | '.join(f'{cell / GIB:.2f}' if cell else '-' for cell in cells)} |", flush=True
        )


if __name__ == "__main__":
    main()
