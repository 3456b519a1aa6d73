"""Rehearse the first run of a new user: download every file of a recipe at its published size, then generate.

    python benchmarks/rehearsal.py RECIPE --folder DIR [--size 512x512] [--device cuda] [-- OPTION ...]

A Hub on this machine serves files with the published names, shapes and lengths and random weights; detectors,
recognizers and the face parser are small stand-ins. The manifest is the product's with other hashes; a weight
file whose length differs from the published one ends the rehearsal. `download`, `generate` twice (the second
time with cached fused models), `download --verify` and `doctor` run in new processes, as a user runs them, on
the CPU in float32 by default. About 35 GB of disk and 20 GB of memory are needed. The images are noise.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.hub_server import Hub, environment_of, hub_server
from support.published_hub import publish

from benchmarks import adapter_files
from benchmarks.published_files import (
    TensorLayout,
    base_configs,
    part_configs,
    part_layouts,
    write,
    write_tokenizer,
)
from fastface_cli.app.licensing import artifacts_of
from fastface_cli.benchmark.sdxl import PADS, PUBLISHED, config_text
from fastface_cli.errors import DeviceError
from fastface_cli.recipe.files import load_recipe
from fastface_cli.store.manifest import WEIGHT_SUFFIXES

CHILD = """
import re, sys
from pathlib import Path
from fastface_cli.store import manifest
manifest.MANIFEST = Path(sys.argv[1])
from fastface_cli.cli import run
code = run(sys.argv[2:])
peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())
print("peak", round(int(peak[1]) / 2**20, 1), "GiB", file=sys.stderr)
raise SystemExit(code)
"""
PORTRAIT = Path(__file__).parents[1] / "examples" / "portrait.png"

WEIGHTS: dict[str, Callable[[], dict[str, TensorLayout]]] = {
    "sdxl-base": lambda: part_layouts("base"),
    "sdxl-base-unet": lambda: part_layouts("base"),
    "sdxl-turbo-unet": lambda: part_layouts("turbo"),
    "sdxl-vae-fp16-fix": lambda: part_layouts("vae"),
    "hyper-sdxl-4-step-lora": lambda: part_layouts("hyper"),
    "lcm-lora-sdxl": lambda: part_layouts("lcm"),
    "sdxl-lightning-4-step-unet": lambda: part_layouts("lightning"),
    "ip-adapter-faceid-plusv2-sdxl": lambda: part_layouts("adapter"),
    "ip-adapter-image-encoder": lambda: part_layouts("image_encoder"),
    "ip-adapter-plus-face-sdxl": lambda: {"": adapter_files.plus_face_layout()},
    "instantid": lambda: {"": adapter_files.instantid_layout()},
    "instantid-controlnet": lambda: {"": adapter_files.controlnet_layout()},
    "pulid-v1": lambda: {"": adapter_files.pulid_v1_layout()},
    "pulid-v1.1": lambda: {"": adapter_files.pulid_v11_layout()},
    "eva02-clip-l-336": lambda: {"": adapter_files.eva_layout()},
}
"""The layouts of each artifact's weight files, by the end of their path."""
OTHER_LENGTH = ("eva02-clip-l-336", "sdxl-vae-fp16-fix")
"""Artifacts whose published file also holds a text tower, or has a header of other order."""


def write_file(name: str, path: str, target: Path, published: int | None) -> None:
    """Write a file with random weights and compare its length with the published one, or a configuration."""
    if not path.endswith(WEIGHT_SUFFIXES):
        write_other(name, path, target)
        return
    layout = next(layout for end, layout in WEIGHTS[name]().items() if path.endswith(end))
    write(target, layout, "random")
    length = target.stat().st_size
    # A pickle has a header for each record; how many there are depends on how its author saved it.
    tolerance = 1e-4 * length if path.endswith(".bin") else 0
    if name not in OTHER_LENGTH and published is not None and abs(length - published) > tolerance:
        raise SystemExit(f"{name}: {path} has {length:,} bytes, the published file {published:,}")


def write_other(name: str, path: str, target: Path) -> None:
    """Write a configuration or a tokenizer."""
    configs = {
        "sdxl-turbo-unet": part_configs("turbo"),
        "sdxl-vae-fp16-fix": part_configs("vae"),
        "ip-adapter-image-encoder": part_configs("image_encoder"),
        "instantid-controlnet": {"config.json": adapter_files.CONTROLNET},
    }.get(name, base_configs(PUBLISHED))
    for tokenizer, pad in PADS.items():
        if path.startswith(f"{tokenizer}/"):
            write_tokenizer(target.parent, PUBLISHED.text_encoder["vocab_size"], pad)
            return
    (config,) = (config for end, config in configs.items() if path.endswith(end))
    target.write_text(config_text(config))


def command(arguments: list[str], manifest: Path, hub: Hub, home: Path, expected: int = 0) -> None:
    """Run one `fastface` command in a new process, and print how long it took."""
    print("$ fastface", *arguments, flush=True)
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(manifest), *arguments], env=environment_of(hub, home), check=False
    )
    print(f"exit code {done.returncode}, {time.perf_counter() - began:.0f} s\n", flush=True)
    if done.returncode != expected:
        raise SystemExit(done.returncode or 1)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--size", default="512x512")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--face", type=Path, default=PORTRAIT)
    parser.add_argument("options", nargs="*", help="further options of `generate`, after --")
    given = parser.parse_args()
    artifacts = artifacts_of(load_recipe(given.recipe).recipe)
    home = given.folder / "home"
    with hub_server() as hub:
        manifest = given.folder / "manifest.json"
        manifest.parent.mkdir(parents=True, exist_ok=True)
        names = [artifact.name for artifact in artifacts.values()]
        manifest.write_text(publish(hub, names, given.folder / "published", write_file))
        command(["download", given.recipe], manifest, hub, home)
        for attempt in ("first", "second"):
            command(
                [
                    *("generate", "--recipe", given.recipe, "--face", str(given.face)),
                    *("-p", "a portrait", "--seed", "1", "--device", given.device, "--size", given.size),
                    *("-o", str(given.folder / f"{given.recipe}-{attempt}.png"), "--force", *given.options),
                ],
                manifest,
                hub,
                home,
            )
        command(["download", given.recipe, "--verify"], manifest, hub, home)
        # Without a GPU it finds that there is none, and must find nothing else.
        expected = 0 if torch.cuda.is_available() else DeviceError.exit_code
        command(["doctor", "--recipe", given.recipe], manifest, hub, home, expected)


if __name__ == "__main__":
    main()
