"""The first run with every adapter: download, check the machine, generate, verify, look at the cache.

The Hub serves the small golden stack under the published names: except for the sizes, a user runs the same.
`benchmarks/rehearsal.py` does it at full size.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support.golden_files import GOLDEN, write_plus_face, write_tower
from support.hub_server import hub_server
from support.published_hub import publish
from support.tiny_manifest import use_hub

from benchmarks.published_files import PT, lora_layout, write, write_tokenizer
from fastface_cli import cli
from fastface_cli.app.licensing import artifacts_of
from fastface_cli.benchmark.sdxl import PADS
from fastface_cli.recipe.files import load_recipe
from fastface_cli.store import manifest

PORTRAIT = Path(__file__).parents[2] / "examples" / "portrait.png"
ADAPTERS = ("hyper-fastface", "lightning-plusface", "hyper-instantid-fastface", "lightning-pulid-dcg")
DISTILLATIONS = ("lcm", "turbo", "dmd2", "tcd", "pcm", "hypercfg", "nitro", "nitrovibrant")


def from_golden(name: str, path: str, target: Path, _length: int | None) -> None:
    """Write a file of the golden stack under its published name."""
    file = path.rpartition("/")[2].replace(".fp16", "")
    match name:
        case "sdxl-base" if path.startswith(tuple(f"{tokenizer}/" for tokenizer in PADS)):
            write_tokenizer(target.parent, 514, PADS[path.partition("/")[0]])
        case "sdxl-base" | "sdxl-base-unet":
            shutil.copyfile(GOLDEN / "pipe" / path.replace(".fp16", ""), target)
        case "sdxl-turbo-unet" | "sdxl-turbo-scheduler" if path.endswith(".json"):
            shutil.copyfile(GOLDEN / "pipe" / path, target)
        case (
            "sdxl-lightning-4-step-unet" | "sdxl-turbo-unet" | "nitrosd-realism-unet" | "nitrosd-vibrant-unet"
        ):
            shutil.copyfile(GOLDEN / "pipe" / "unet" / "diffusion_pytorch_model.safetensors", target)
        case "sdxl-vae-fp16-fix":
            shutil.copyfile(GOLDEN / "pipe" / "vae" / file, target)
        case _ if name.endswith("-lora") or name == "lcm-lora-sdxl":
            config = json.loads((GOLDEN / "pipe" / "unet" / "config.json").read_text())
            write(target, lora_layout(config, 4, torch.float32, PT), "random")
        case "ip-adapter-faceid-plusv2-sdxl":
            shutil.copyfile(GOLDEN / "faceid_plusv2.bin", target)
        case "ip-adapter-image-encoder":
            shutil.copyfile(GOLDEN / "clip" / file, target)
        case "ip-adapter-plus-face-sdxl":
            write_plus_face(target)
        case "instantid":
            shutil.copyfile(GOLDEN / "instantid" / file, target)
        case "instantid-controlnet":
            shutil.copyfile(GOLDEN / "instantid" / "controlnet" / file, target)
        case "pulid-v1":
            save_file(torch.load(GOLDEN / "pulid" / "pulid_v1.bin", weights_only=True), target)
        case "eva02-clip-l-336":
            write_tower(target)


@pytest.fixture
def recipe(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The name of a recipe whose files the Hub serves."""
    with hub_server() as hub:
        names = [artifact.name for artifact in artifacts_of(load_recipe(request.param).recipe).values()]
        (tmp_path / "manifest.yaml").write_text(publish(hub, names, tmp_path / "published", from_golden))
        use_hub(monkeypatch, hub, tmp_path / "home")
        monkeypatch.setattr(manifest, "MANIFEST", tmp_path / "manifest.yaml")
        manifest.load_manifest.cache_clear()
        yield request.param
    manifest.load_manifest.cache_clear()


@pytest.mark.parametrize("recipe", ADAPTERS, indirect=True)
def test_first_run(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str, code: int = 0) -> dict:
        ended = cli.run([*arguments, "--json"])
        result = json.loads(capsys.readouterr().out)
        assert ended == code, result
        return result

    def generate(name: str, *options: str, code: int = 0) -> bytes:
        result = run(
            *("generate", "--recipe", recipe, "--face", str(PORTRAIT), "-p", "a portrait", "--seed", "1"),
            *("--size", "128x128", "-o", str(tmp_path / name), *options),
            code=code,
        )
        return b"".join(Image.open(image["path"]).tobytes() for image in result["images"])

    def problems() -> list[str]:
        findings = run("doctor", "--recipe", recipe)["findings"]
        return [
            finding["check"]
            for finding in findings
            if finding["level"] == "failure" or (finding["check"], finding["level"]) == ("Models", "warning")
        ]

    models = {artifact.name for artifact in artifacts_of(load_recipe(recipe).recipe).values()}
    run("download", recipe)
    assert not problems()
    first = generate("first.png")
    assert len(set(first)) > 30, "an image of many colors"
    assert generate("second.png", "--offline") == first
    run("download", recipe, "--verify")
    assert {entry["name"] for entry in run("cache", "list")["artefacts"] if entry["complete"]} == models
    assert run("licenses", "--recipe", recipe)["ok"]
    run("cache", "remove", "--all", "--yes")
    generate("third.png", "--offline", code=3)
    assert problems() == ["Models"]
    assert generate("third.png") == first, "downloads what is missing"


@pytest.mark.parametrize("recipe", [f"{name}-fastface" for name in DISTILLATIONS], indirect=True)
def test_other_distillations(recipe: str, tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    person = ("--face", str(PORTRAIT), "-p", "a portrait")
    assert cli.run(["generate", "--recipe", recipe, *person, "--size", "128x128", "-o", str(image)]) == 0
    assert len(set(Image.open(image).tobytes())) > 30
