"""What a session reports while a run is in progress: typed, frozen events in the order of the work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from PIL import Image

    from ..identity.identity import Identity
    from ..recipe.schema import Recipe
    from ..sampling.guidance import Step
    from .best_of import Candidates


@dataclass(frozen=True)
class RunStarted:
    """The request is valid; no model has been loaded yet."""

    recipe: Recipe
    seeds: tuple[int, ...]
    """Seed of each image of a prompt."""
    images: int
    """Images that are drawn, candidates included."""


@dataclass(frozen=True)
class IdentityReady:
    """The face was found and embedded, or a saved identity was read."""

    identity: Identity
    matches_replay: bool
    """False where another person was conditioned on than in the replayed image."""


@dataclass(frozen=True)
class ModelsReady:
    """The models are on their device."""

    seconds: float
    """Time to load them; close to 0 where they were loaded before."""
    device: str
    dtype: str
    steps: tuple[Step, ...]
    """What each sampling step computes."""


@dataclass(frozen=True)
class StepFinished:
    """A batch of images finished one sampling step."""

    images: int
    """Images in the batch."""
    done: int
    """Steps finished so far, counted per image."""
    total: int
    """Steps of the run, counted per image."""


@dataclass(frozen=True)
class ImageFinished:
    """An image was written."""

    path: Path
    image: Image.Image
    """8-bit RGB."""
    record: Mapping[str, Any]
    """Plain data for JSON: path, prompt, seed, adapter scale, UNet samples, seconds."""
    candidates: Candidates | None = None
    """What the choice was made from, where the best of several was kept."""


@dataclass(frozen=True)
class RunFinished:
    """Every image was written."""

    images: int
    grid: Path | None = None
    """The contact sheet, where one was asked for."""


Event: TypeAlias = RunStarted | IdentityReady | ModelsReady | StepFinished | ImageFinished | RunFinished
