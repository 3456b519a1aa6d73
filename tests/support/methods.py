"""Recipes of every method, and how tests draw and compare with them."""

from __future__ import annotations

import torch

from fastface_cli.app.pipeline import Pipeline, Request
from fastface_cli.recipe.schema import Recipe

AM1 = {"transforms": ["power", "scale"]}


AM2 = {
    "transforms": [
        {"kind": "adaptive_softmask", "k": [7.5, 5.0, 5.0, 5.0], "level": 0.65},
        {"kind": "scale", "g": [1.0, 1.55, 1.55, 1.55]},
    ],
    "invert_token_0": True,
}


DCG = {"identity": [1.0, 1.5, 1.5, 1.0], "text": [1.0, 3.0, 3.0, 1.0], "rescale": 0.75}


def recipe_of(**sections) -> Recipe:
    model = {
        "base": "base",
        "adapter": "adapter",
        "image_encoder": "encoder",
        "face": "face",
        "scheduler": {"kind": "ddim", "spacing": "trailing"},
    }
    sampling = {"steps": 4, "width": 128, "height": 128}
    return Recipe.model_validate({"name": "test", "model": model, "sampling": sampling, **sections})


FASTFACE = recipe_of(guidance=DCG, attention=AM1)


METHODS = {
    "am1": recipe_of(attention=AM1),
    "fastface": FASTFACE,
    "am2": recipe_of(attention=AM2),
    "fastface-am2": recipe_of(guidance=DCG, attention={**AM2, "blend": {}}),
}


def requests(person) -> list[Request]:
    return [Request("a person", 5, person), Request("a dog", 6, person, "blur", 0.4)]


def latents(pipeline: Pipeline, expected: list[Request]) -> torch.Tensor:
    return torch.stack([picture.latents for picture in pipeline.generate(expected, batch_size=2)])


def assert_same(actual: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    """Relative error of every step of every picture."""
    error = (actual - expected).flatten(2).norm(dim=2) / expected.flatten(2).norm(dim=2)
    assert float(error.max()) <= limit, error
