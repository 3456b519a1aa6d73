"""Resolve a request: everything that can be checked without a model."""

from __future__ import annotations

import logging
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cachetools import LRUCache

from ..errors import UsageError
from ..files import check_target
from ..identity.features import NEEDED
from ..models.acceleration import LOSSY
from ..output.images import plan_paths
from ..output.metadata import Provenance
from ..output.replay import read as read_provenance
from ..recipe.files import Flag, load_recipe, load_recipe_data
from ..recipe.schema import AdapterScale, scale_text
from ..store.manifest import load_manifest
from .licensing import artifacts_of, check_commercial
from .request import GenerateRequest, OutputPlan

if TYPE_CHECKING:
    from ..recipe.schema import Recipe

log = logging.getLogger(__name__)


class OutputNames:
    """The paths of all images of a run.

    Names may contain the seed, so that they depend on which candidate is kept. Only the names of first
    candidates are planned and checked before the run; planning all of them would take minutes.
    """

    def __init__(
        self, output: OutputPlan, recipe: Recipe, contents: Sequence[tuple[str, int, AdapterScale]]
    ) -> None:
        self._output = output
        self._recipe = recipe
        self._contents = contents
        self._planned = LRUCache[int, list[Path]](16)
        self.first = self._plan(0, force=output.force)

    def path(self, index: int, candidate: int) -> Path:
        """The path of an image (counted from 0) if this candidate is kept."""
        if candidate == 0:
            return self.first[index]
        if candidate not in self._planned:
            # A name that is taken by then gets a number when the image is written.
            self._planned[candidate] = self._plan(candidate, force=True)
        return self._planned[candidate][index]

    def _plan(self, candidate: int, *, force: bool) -> list[Path]:
        fields: list[Mapping[str, str | int | float]] = [
            {
                "recipe": self._recipe.name,
                "prompt": prompt,
                "scale": scale_text(scale),
                "index": index,
                "seed": seed + candidate,
            }
            for index, (prompt, seed, scale) in enumerate(self._contents, start=1)
        ]
        return plan_paths(self._output.path, count=len(fields), fields=fields, force=force)


@dataclass(frozen=True)
class ImageCell:
    """One image of a run."""

    prompt: str
    seed: int
    """Seed of the first candidate."""
    adapter_scale: AdapterScale
    index: int
    """Position in the run, counted from 0."""


@dataclass(frozen=True)
class RunPlan:
    """A resolved request."""

    recipe: Recipe
    negative_prompt: str | None
    """None: zero embeddings, which is not the encoding of an empty text."""
    seeds: tuple[int, ...]
    cells: tuple[ImageCell, ...]
    names: OutputNames | None
    """None if the request has no output."""
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
    if request.pose is not None:
        check_pose(recipe)
    if request.aspect is not None:
        recipe = _with_aspect(recipe, request.aspect)
    prompts = request.prompts or ((defaults.prompt,) if defaults.prompt is not None else ())
    if not prompts and not request.only_identity:
        raise UsageError("there is no prompt", 'describe the image: --prompt "a portrait in a garden"')
    if not all(prompt.strip() for prompt in prompts):
        raise UsageError("a prompt is empty", 'describe the image: --prompt "a portrait in a garden"')
    seeds = _seeds(request, defaults.seed)
    negative = defaults.negative_prompt if request.negative_prompt is None else request.negative_prompt
    scales = request.adapter_scales or (defaults.adapter.scale,)
    contents = [(prompt, seed, scale) for prompt in prompts for seed in seeds for scale in scales]
    cells = tuple(ImageCell(*content, index) for index, content in enumerate(contents))
    names = grid = None
    if request.output is not None:
        names = OutputNames(request.output, recipe, contents)
        first = names.first[0] if contents else None
        grid = first.with_name(f"{first.stem}-grid.png") if first and request.output.grid else None
        _check_targets(request.output, names.first, grid)
    expected = provenance.identity_digest if provenance else None
    return RunPlan(recipe, negative, seeds, cells, names, grid, expected)


def check_pose(recipe: Recipe) -> None:
    """Refuse a pose for an adapter that does not read key points.

    Raises:
        UsageError: the adapter does not.
    """
    if "key_points" not in NEEDED[recipe.adapter.kind]:
        raise UsageError(
            f"a pose is for InstantID, and recipe '{recipe.name}' uses {recipe.adapter.kind}",
            "use a recipe such as hyper-instantid-fastface, or omit the pose",
        )


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


def _with_aspect(recipe: Recipe, aspect: tuple[int, int]) -> Recipe:
    """The recipe with another shape of about the same area: both sides in 16ths of its shorter side."""
    width, height = recipe.sampling.width, recipe.sampling.height
    unit = max(8, min(width, height) // 16 // 8 * 8)
    ratio = math.sqrt(aspect[0] / aspect[1])
    sides = [max(1, round(math.sqrt(width * height) * share / unit)) * unit for share in (ratio, 1 / ratio)]
    if max(sides) > 4 * min(sides):
        raise UsageError(f"the aspect ratio {aspect[0]}:{aspect[1]} is too long", "use at most 4:1")
    return recipe.model_copy(
        update={"sampling": recipe.sampling.model_copy(update={"width": sides[0], "height": sides[1]})}
    )


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


def _check_targets(output: OutputPlan, paths: Sequence[Path], grid: Path | None) -> None:
    taken = {os.path.abspath(path) for path in paths}
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
    _check_repositories(request, recipe, overridden)
    for part in provenance.changed_local_parts(recipe):
        log.warning("warning: %s is not the file '%s' that the image was made with", part.field, part.name)
    # Known names only: the metadata of an image is not trusted, and this is printed.
    recorded = {name: value for name, value in (provenance.lossy or {}).items() if name in LOSSY}
    missing = {name: value for name, value in recorded.items() if lossy.get(name) != value}
    if missing:
        items = [f"--accelerate {name}={'on' if value is True else value}" for name, value in missing.items()]
        log.warning(
            "warning: the image was made with %s; without it this one differs slightly", " ".join(items)
        )
    return recipe


def _check_repositories(request: GenerateRequest, recipe: Recipe, overridden: Sequence[str]) -> None:
    """Refuse Hub repositories that only the image names: its author chose what would be downloaded.

    Raises:
        UsageError: there is one, and neither `allow_hub` nor an override names it.
    """
    if request.allow_hub or request.stack is not None:
        return
    pinned = {(artifact.repo, artifact.commit) for artifact in load_manifest().values()}
    for role, artifact in artifacts_of(recipe).items():
        is_chosen = any(
            field.startswith(("model." + role.partition(".")[0], "model=")) for field in overridden
        )
        if artifact.repo is None or (artifact.repo, artifact.commit) in pinned or is_chosen:
            continue
        raise UsageError(
            f"{request.replay} was made with {artifact.name}, which fastface does not know",
            "pass --allow-hub to download it if you trust the author of the image, or --set another model",
        )


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
