"""Compare the loading time with and without cached fused models.

    python benchmarks/coldstart.py [--full] [--runs 3] [--cold] [--touch] [--folder DIR] [--json FILE]

Writes models with random weights in the published file layout, then loads them in new processes, alternately
with and without the cached file. It measures what `generate` does before its first step, without imports:
all models on the CPU in float16, nothing sampled. `--full` uses the published size (10 GB of disk, 16 GB
with the cached file, 9 GiB of memory) instead of the miniature.

Cached models are memory-mapped and read on first use. `--touch` also reads every page of every model, as the
first image would. `--cold` drops all files from the page cache before each run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TARGET = 0.6
PARTS = ("base", "hyper", "vae", "adapter", "image_encoder")


def recipe() -> Any:
    """Return the recipe `hyper-fastface` with the file names of `write_stack`."""
    from fastface_cli.recipe.schema import Recipe

    roles = ("base", "distillation", "vae", "adapter", "image_encoder", "face")
    return Recipe.model_validate(
        {
            "name": "coldstart",
            "model": {
                **{role: role for role in roles},
                "scheduler": {"kind": "ddim", "spacing": "trailing"},
            },
        }
    )


def write(folder: Path, *, full: bool) -> None:
    """Write the models to the disk."""
    from published_files import write_stack

    from fastface_cli.benchmark.sdxl import MINIATURE, PUBLISHED

    write_stack(folder, PUBLISHED if full else MINIATURE, fill="random", parts=PARTS)


def load(folder: Path, *, keep: bool, touch: bool) -> dict[str, float]:
    """Load the models in this process, and return seconds and peak memory in GiB."""
    from published_files import PARTS as PLACES

    from fastface_cli.app.pipeline import Pipeline
    from fastface_cli.store.fused_cache import FusedCache

    paths = {part: folder / PLACES[part] for part in PARTS}
    paths["distillation"] = paths.pop("hyper")
    cache = FusedCache(folder / "fused", 1 << 40, least=0) if keep else None
    began = time.perf_counter()
    loaded = Pipeline.load(recipe(), paths, device="cpu", dtype="float16", fused=cache)
    if touch:
        parts = loaded.parts
        models = (loaded.unet, loaded.vae, loaded.projection, parts.image_encoder)
        for model in (*models, parts.text_encoder, parts.text_encoder_2):
            for parameter in model.parameters():
                parameter.view(-1)[:: 4096 // parameter.itemsize].sum()  # one value of each page
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def drop_page_cache(folder: Path) -> None:
    """Ask the kernel to drop every file under a folder from the page cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured(folder: Path, options: argparse.Namespace, *, keep: bool) -> dict[str, float]:
    """Run `load` in a new process."""
    if options.cold:
        drop_page_cache(folder)
    command = [sys.executable, __file__, "--load", "kept" if keep else "plain", "--folder", str(folder)]
    command += ["--touch"] * options.touch
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    measurement: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return measurement


def run(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run all measurements."""
    write(folder, full=options.full)
    first = measured(folder, options, keep=True)
    kept: list[dict[str, float]] = []
    plain: list[dict[str, float]] = []
    for _ in range(options.runs):
        plain.append(measured(folder, options, keep=False))
        kept.append(measured(folder, options, keep=True))
    medians = [statistics.median(result["seconds"] for result in runs) for runs in (kept, plain)]
    return {
        "stack": "published size" if options.full else "miniature",
        "weights": "random",
        "files": "read from the disk" if options.cold else "read through the page cache",
        "every page read": options.touch,
        "kept_bytes": sum(path.stat().st_size for path in (folder / "fused").glob("*.safetensors")),
        "first_build_and_keep": first,
        "without": plain,
        "with": kept,
        "ratio": medians[0] / medians[1],
        "target": TARGET,
    }


def show(report: dict[str, Any]) -> None:
    print(f"{report['stack']}, random weights, CPU, float16, loaded only; files {report['files']}")
    print(f"{report['first_build_and_keep']['seconds']:8.2f} s  first load, which writes the cache")
    for label in ("without", "with"):
        seconds = sorted(result["seconds"] for result in report[label])
        peak = max(result["peak_gib"] for result in report[label])
        times = " ".join(f"{second:.2f}" for second in seconds)
        median = statistics.median(seconds)
        print(f"{median:8.2f} s  {label} cached models (runs: {times}; peak {peak:.1f} GiB)")
    print(f"{report['ratio']:8.3f}    ratio (target: at most {report['target']} at the published size)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--full", action="store_true", help="use the published size")
    parser.add_argument("--runs", type=int, default=3, help="runs with and without the cache")
    parser.add_argument("--cold", action="store_true", help="read all files from the disk")
    parser.add_argument("--touch", action="store_true", help="read every page")
    parser.add_argument("--folder", type=Path, help="parent of the temporary folder for the models")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--load", choices=["kept", "plain"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(load(options.folder, keep=options.load == "kept", touch=options.touch)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        report = run(Path(folder), options)
    show(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
