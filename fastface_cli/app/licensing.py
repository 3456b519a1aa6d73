"""The model parts of a recipe, and what their licenses allow. This is not legal advice."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from ..errors import LicenseError
from ..recipe.schema import Recipe
from ..store.manifest import Artifact, resolve

log = logging.getLogger(__name__)


def artifacts_of(recipe: Recipe) -> dict[str, Artifact]:
    """Every model part of a recipe, by role.

    Raises:
        RecipeError: a reference is neither a known name, a path nor a pinned repository.
    """
    return {role: resolve(reference) for role, reference in recipe.references().items()}


def check_commercial(artifacts: Iterable[Artifact], user: str) -> None:
    """Refuse parts whose license forbids commercial use, and log those whose license is unclear.

    A saved identity changes nothing: its embedding was computed by the face models.

    Args:
        artifacts: the model parts that will be used.
        user: what uses them, such as "recipe 'pocket'".

    Raises:
        LicenseError: names every part that forbids it.
    """
    parts = {artifact.name: artifact for artifact in artifacts}.values()
    for part in parts:
        if part.commercial == "unclear":
            note = part.commercial_note or "its license is not known"
            log.warning("%s", f"commercial use of {part.name} is unclear: {note} {part.page}".rstrip())
    forbidden = [f"{part.name} ({part.license})" for part in parts if part.commercial == "no"]
    if forbidden:
        raise LicenseError(
            f"{user} may not be used commercially: {', '.join(forbidden)}",
            "`fastface licenses` lists the terms of each part; recipe 'pocket' is free, and "
            "--set model.PART=... names another part",
        )
