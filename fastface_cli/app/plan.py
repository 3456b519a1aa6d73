"""Resolve a request: everything that can be checked without a model."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..files import check_target
from ..output.images import plan_paths
from ..output.metadata import Provenance
from ..output.replay import read as read_provenance
from ..recipe.files import Flag, load_recipe, load_recipe_data
from .licensing import artifacts_of, check_commercial
from .request import GenerateRequest, OutputPlan

if TYPE_CHECKING:
    from ..recipe.schema import Recipe

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageCell:
    """One image of a run."""

    prompt: str
    seed: int
    """Seed of the first candidate."""
    adapter_scale: float
    paths: tuple[Path, ...] = ()
    """Path of the image, per candidate, because names may contain the seed; empty without an output."""

    def path(self, candidate: int) -> Path | None:
        """The path of the image if this candidate is kept; None without an output."""
        return self.paths[candidate] if self.paths else None


@dataclass(frozen=True)
class RunPlan:
    """A resolved request."""

    recipe: Recipe
    negative_prompt: str | None
    """None: zero embeddings, which is not the encoding of an empty text."""
    seeds: tuple[int, ...]
    cells: tuple[ImageCell, ...]
    grid: Path | None
    expected_identity: str | None
    """Digest of the identity that the replayed image was made with."""


def plan_run(request: GenerateRequest, default: str | Recipe, lossy: Mapping[str, object]) -> RunPlan:
    """Resolve a request.

    Args:
        request: the run.
        default: the recipe if the request names none.
        lossy: lossy optimizations of this run, see `Acceleration.lossy`.

    Raises:
        UsageError: something is missing or contradictory, or a file exists already.
        LicenseError: commercial use is requested, and a license forbids it.
    """
    provenance = None if request.replay is None else read_provenance(request.replay)
    if provenance is None:
        recipe = _load(request, request.recipe or default)
        defaults = recipe
    else:
        recipe = _replayed_recipe(request, provenance, lossy)
        defaults = _changed(request, provenance.as_run())
    if request.commercial:
        check_commercial(artifacts_of(recipe).values(), f"recipe '{recipe.name}'")
    prompts = request.prompts or ((defaults.prompt,) if defaults.prompt is not None else ())
    if not prompts:
        raise UsageError("there is no prompt", 'describe the image: --prompt "a portrait in a garden"')
    seeds = _seeds(request, defaults.seed)
    negative = defaults.negative_prompt if request.negative_prompt is None else request.negative_prompt
    cells = _cells(request, recipe, prompts, seeds, request.adapter_scales or (defaults.adapter.scale,))
    grid = None
    if request.output is not None:
        first = cells[0].paths[0]
        grid = first.with_name(f"{first.stem}-grid.png") if request.output.grid else None
        _check_targets(request.output, cells, grid)
    expected = provenance.identity_digest if provenance else None
    return RunPlan(recipe, negative, seeds, cells, grid, expected)


def _load(request: GenerateRequest, base: str | Recipe) -> Recipe:
    """The request's recipe: read from a file, or derived from one that is loaded already."""
    changes = _flags(request)
    if not isinstance(base, str) and not (changes or request.overrides or request.stack):
        return base
    if isinstance(base, str):
        resolved = load_recipe(base, overrides=request.overrides, flags=changes, stack=request.stack)
    else:
        resolved = load_recipe_data(
            base.canonical(), base.name, overrides=request.overrides, flags=changes, stack=request.stack
        )
    return resolved.recipe


def random_seed() -> int:
    """Return a random seed that is short enough to type."""
    return secrets.randbelow(2**32)


def _seeds(request: GenerateRequest, default: int | None) -> tuple[int, ...]:
    first = default if request.seed is None else request.seed
    if first is None:
        first = random_seed()
    if not 0 <= first <= 2**63 - request.count * request.best_of:
        raise UsageError(f"seed {first} is out of range", "a seed is between 0 and 2^63 - 1")
    return tuple(first + index * request.best_of for index in range(request.count))


def _cells(
    request: GenerateRequest,
    recipe: Recipe,
    prompts: tuple[str, ...],
    seeds: tuple[int, ...],
    scales: tuple[float, ...],
) -> tuple[ImageCell, ...]:
    contents = [(prompt, seed, scale) for prompt in prompts for seed in seeds for scale in scales]
    output = request.output
    if output is None:
        return tuple(ImageCell(*content) for content in contents)

    def fields(candidate: int) -> Iterator[Mapping[str, str | int | float]]:
        for index, (prompt, seed, scale) in enumerate(contents, start=1):
            named: dict[str, str | int | float] = {
                "recipe": recipe.name,
                "prompt": prompt,
                "scale": scale,
                "index": index,
            }
            yield {**named, "seed": seed + candidate}

    by_candidate = [
        plan_paths(output.path, count=len(contents), fields=list(fields(candidate)), force=output.force)
        for candidate in range(request.best_of)
    ]
    paths = zip(*by_candidate, strict=True)
    return tuple(ImageCell(*content, each) for content, each in zip(contents, paths, strict=True))


def _check_targets(output: OutputPlan, cells: tuple[ImageCell, ...], grid: Path | None) -> None:
    taken = {os.path.abspath(path) for cell in cells for path in cell.paths}
    extras = {
        "--save-identity": output.save_identity,
        "--save-latents": output.save_latents,
        "--grid": grid,
    }
    for flag, extra in extras.items():
        if extra is None:
            continue
        check_target(extra, force=output.force)
        if os.path.abspath(extra) in taken:
            raise UsageError(f"{flag} and another output both go to {extra}", "choose another name")
        taken.add(os.path.abspath(extra))


def _replayed_recipe(request: GenerateRequest, provenance: Provenance, lossy: Mapping[str, object]) -> Recipe:
    overridden = [override.partition("=")[0].strip() for override in request.overrides]
    provenance.require_local_parts(overridden + (["model"] if request.stack else []))
    recipe = _changed(request, provenance.recipe)
    for part in provenance.changed_local_parts(recipe):
        log.warning("warning: %s is not the file '%s' that the image was made with", part.field, part.name)
    missing = {name: value for name, value in (provenance.lossy or {}).items() if lossy.get(name) != value}
    if missing:
        items = [f"--accelerate {name}={'on' if value is True else value}" for name, value in missing.items()]
        log.warning(
            "warning: the image was made with %s; without it this one differs slightly", " ".join(items)
        )
    return recipe


def _changed(request: GenerateRequest, recipe: Recipe) -> Recipe:
    """Apply the changes of this request to the recipe of an image."""
    return load_recipe_data(
        recipe.canonical(),
        str(request.replay),
        overrides=request.overrides,
        flags=_flags(request),
        stack=request.stack,
    ).recipe


def _flags(request: GenerateRequest) -> dict[str, Flag]:
    return {field: (change.value, change.origin) for field, change in request.changes.items()}
