"""Measure the GPU memory and time of each `--low-memory` level at full size, and run it under a cap.

    python benchmarks/memory.py [--recipe hyper-fastface] [--levels 12 8 6] [--small]

The weights are random, created on the GPU and then offloaded, so the peak is that of the second image. Under
the cap, PyTorch may reserve only the level's memory less 0.6 GiB for the CUDA context; larger allocations
fail. Prints one JSON line for each level. --small uses a miniature on the CPU, to test this script.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch

from fastface_cli.app.pipeline import Pipeline
from fastface_cli.benchmark.hardware import device_peak
from fastface_cli.benchmark.random_stack import random_pipeline
from fastface_cli.benchmark.run import one_round
from fastface_cli.benchmark.sdxl import MINIATURE, PUBLISHED
from fastface_cli.benchmark.timing import synchronize
from fastface_cli.errors import FastFaceError
from fastface_cli.models.offload import GIB, LEVELS
from fastface_cli.recipe.files import load_recipe

CONTEXT = 0.6
"""GiB of the CUDA context, which PyTorch does not count."""


def image(pipeline: Pipeline, number: int) -> float:
    """Seconds of one image."""
    began = time.perf_counter()
    one_round(pipeline, number, 1, None, None)
    synchronize(pipeline.device)
    return time.perf_counter() - began


def measured(name: Any, recipe: Any, device: torch.device, *, small: bool) -> dict[str, Any]:
    """The row of a level."""
    dtype, stack = (torch.float32, MINIATURE) if small else (torch.float16, PUBLISHED)
    pipeline = random_pipeline(recipe, device, dtype, stack=stack, level=LEVELS[name])
    first = image(pipeline, 0)
    device_peak(device, reset=True)
    row = {"level": name, "first": first, "seconds": image(pipeline, 1), "peak": device_peak(device)}
    if name != "off" and not small:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        cap = float(name) - CONTEXT
        torch.cuda.set_per_process_memory_fraction(cap * GIB / total)
        try:
            row |= {"cap_gib": cap, "capped_seconds": image(pipeline, 2)}
        except FastFaceError as error:
            row |= {"cap_gib": cap, "capped_error": str(error)}
        torch.cuda.set_per_process_memory_fraction(1.0)
    return row


def main() -> None:
    """Measure every level."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--recipe", default="hyper-fastface")
    parser.add_argument("--levels", nargs="+", default=["12", "8", "6"])
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    size = ["sampling.width=128", "sampling.height=128"] if options.small else []
    recipe = load_recipe(options.recipe, overrides=size).recipe
    device = torch.device("cpu" if options.small else "cuda")
    for name in options.levels:
        print(json.dumps(measured(name, recipe, device, small=options.small)), flush=True)


if __name__ == "__main__":
    main()
