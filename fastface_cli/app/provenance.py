"""The provenance of an image of the pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..output.metadata import BestOf, Provenance, installed_versions
from ..recipe.schema import Recipe
from .pipeline import GeneratedImage


def provenance_of(
    recipe: Recipe, image: GeneratedImage, *, best_of: Mapping[str, Any] | None = None
) -> Provenance:
    """Return how an image of the pipeline was made.

    Args:
        recipe: as resolved for the run.
        image: the image.
        best_of: the fields of `BestOf`, if the image was selected from several candidates.
    """
    request = image.request
    return Provenance(
        recipe=recipe,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        seed=request.seed,
        adapter_scale=image.adapter_scale,
        identity_digest=request.identity.digest(),
        unet_samples=image.unet_samples,
        versions=installed_versions(),
        best_of=BestOf(**best_of) if best_of else None,
        lossy=dict(image.lossy) or None,
    )
