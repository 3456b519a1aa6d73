"""How long a stack takes to load, with the fused models kept from the run before and without.

    python benchmarks/coldstart.py [--full] [--runs 3] [--cold] [--touch] [--folder DIR] [--json FILE]

Writes a stack of random weights in the published files' form (float16 where published so), then loads it
in processes of their own, in turn with and without the kept file. Timed is what `generate` does between its
start and its first step, imports apart: all models on the CPU in float16, nothing sampled. `--full` is the
published size (10 GB of disk, 16 GB with the kept file, 9 GiB of memory); without it, the miniature.

Kept models are mapped from their file and read when they are used. `--touch` reads every page of every model
within the time, which is what a first picture would make it do. `--cold` asks the kernel to forget all files
before each run, so that they come from the disk; else from the page cache as far as it reaches.
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
    """The stack of `hyper-fastface`, under the names that `write_stack` gives."""
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
    """The stack on the disk."""
    from fastface_cli.benchmark.sdxl import MINIATURE, PUBLISHED
    from fastface_cli.benchmark.structure import write_stack

    write_stack(folder, PUBLISHED if full else MINIATURE, fill="random", parts=PARTS)


def load(folder: Path, *, keep: bool, touch: bool) -> dict[str, float]:
    """Load the stack in this process: seconds, and peak memory in GiB."""
    from fastface_cli.app.pipeline import Pipeline
    from fastface_cli.benchmark.structure import PARTS as PLACES
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
                parameter.view(-1)[:: 4096 // parameter.itemsize].sum()  # one number of each page
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def forget(folder: Path) -> None:
    """Ask the kernel to drop the pages of every file below a folder."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured(folder: Path, options: argparse.Namespace, *, keep: bool) -> dict[str, float]:
    """`load` in a process of its own."""
    if options.cold:
        forget(folder)
    command = [sys.executable, __file__, "--load", "kept" if keep else "plain", "--folder", str(folder)]
    command += ["--touch"] * options.touch
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Everything that is measured."""
    write(folder, full=options.full)
    first = measured(folder, options, keep=True)
    kept: list[dict[str, float]] = []
    plain: list[dict[str, float]] = []
    for _ in range(options.runs):
        plain.append(measured(folder, options, keep=False))
        kept.append(measured(folder, options, keep=True))
    medians = [statistics.median(one["seconds"] for one in runs) for runs in (kept, plain)]
    return {
        "stack": "published size" if options.full else "miniature",
        "weights": "random",
        "files": "from the disk" if options.cold else "in the page cache as far as it reaches",
        "every page read": options.touch,
        "kept_bytes": sum(path.stat().st_size for path in (folder / "fused").glob("*.safetensors")),
        "first_build_and_keep": first,
        "without": plain,
        "with": kept,
        "ratio": medians[0] / medians[1],
        "target": TARGET,
    }


def show(found: dict[str, Any]) -> None:
    print(f"{found['stack']}, random weights, CPU, float16, loaded only; files {found['files']}")
    print(f"{found['first_build_and_keep']['seconds']:8.2f} s  first build, and keeping it")
    for label in ("without", "with"):
        seconds = sorted(one["seconds"] for one in found[label])
        peak = max(one["peak_gib"] for one in found[label])
        times = " ".join(f"{one:.2f}" for one in seconds)
        median = statistics.median(seconds)
        print(f"{median:8.2f} s  {label} the kept models (runs: {times}; peak {peak:.1f} GiB)")
    print(f"{found['ratio']:8.3f}    ratio (wanted: at most {found['target']} in the published size)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the published size")
    parser.add_argument("--runs", type=int, default=3, help="of each kind")
    parser.add_argument("--cold", action="store_true", help="from the disk")
    parser.add_argument("--touch", action="store_true", help="read every page")
    parser.add_argument("--folder", type=Path, help="where the stack is written; a new temporary folder")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--load", choices=["kept", "plain"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(load(options.folder, keep=options.load == "kept", touch=options.touch)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = run(Path(folder), options)
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
