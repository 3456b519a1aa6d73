"""What each level of `--low-memory` leaves on a card: tensors counted at the published size, no GPU needed.

    python benchmarks/footprint.py [--recipe hyper-fastface] [--size 1024]

GiB in half precision, one picture, by stage; the context, workspaces and gaps between tensors come on top.
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
    print(f"| --low-memory | between pictures | {' | '.join(STAGES)} | most |")
    print("|---|---|" + "---|" * len(STAGES) + "---|")
    for name, level in LEVELS.items():
        found = count(recipe, level)
        cells = [found.resident, *(found.stages.get(stage, 0) for stage in STAGES), found.peak]
        print(
            f"| {name} | {' | '.join(f'{cell / GIB:.2f}' if cell else '-' for cell in cells)} |", flush=True
        )


if __name__ == "__main__":
    main()
