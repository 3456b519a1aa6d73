"""The published structure, which `fastface bench` times against ours, makes the golden latents too."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from fastface_cli.app.pipeline import Request
from fastface_cli.app.stack import fetch
from fastface_cli.benchmark.reference import PublishedPipeline
from fastface_cli.identity.identity import Identity
from fastface_cli.recipe.files import load_recipe
from fastface_cli.settings import load_settings

CASES = sorted(p.stem for p in (Path(__file__).parents[1] / "data" / "golden" / "cases").glob("*.json"))


@pytest.mark.parametrize("case", CASES)
def test_golden_case(case: str, golden: Path) -> None:
    source = golden / "cases" / f"{case}.json"
    recipe = load_recipe(str(source), stack=golden).recipe
    paths = fetch(recipe, load_settings(), recipe.references().keys() - recipe.photo_roles())
    reference = PublishedPipeline.load(recipe, paths, device="cpu", dtype="float32")
    identity = Identity.load(golden / "identity.safetensors")
    assert recipe.prompt is not None
    assert recipe.seed is not None
    request = Request(recipe.prompt, recipe.seed, identity, recipe.negative_prompt)
    picture = next(reference.generate([request]))
    expected = load_file(source.with_suffix(".safetensors"))
    limit = 2e-4 if any(word in case for word in ("softmask", "am2")) else 1e-5
    assert picture.unet_samples == 12
    assert picture.initial_latents.equal(expected["initial_latents"][0])
    for step, (actual, exact) in enumerate(zip(picture.latents, expected["latents"][:, 0], strict=True)):
        error = float((actual - exact).norm() / exact.norm())
        assert error <= limit, f"step {step}: {error:.2e}"
