"""The events of a run: typed, frozen, in the order of the work. Those of downloads come from the store."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..store.progress import DownloadProgress, DownloadStarted, FileFinished, VerifyProgress

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ..identity.identity import Identity
    from ..output.metadata import Provenance
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
    """Number of generated images, including candidates."""


@dataclass(frozen=True)
class IdentityReady:
    """The face was found and embedded, or a saved identity was read."""

    identity: Identity
    matches_replay: bool
    """False if the replayed image was made with another identity."""
    saved: Path | None = None
    """The identity file written."""


@dataclass(frozen=True)
class ModelsReady:
    """The models are on their device."""

    seconds: float
    """Time to load them; close to 0 if they were loaded before."""
    device: str
    dtype: str
    steps: tuple[Step, ...]
    """What each sampling step computes."""


@dataclass(frozen=True)
class StepFinished:
    """A batch of images finished one sampling step."""

    images: int
    """Images in the batch."""
    step: int
    """Number of the step, from 1."""
    done: int
    """Steps finished so far, counted per image."""
    total: int
    """Steps of the run, counted per image."""
    latents: Tensor = field(repr=False, compare=False)
    """[images, C, h, w] on the device. Reading them waits for the device, and nothing else does."""


@dataclass(frozen=True)
class ImageFinished:
    """An image is finished, and written if the request has an output."""

    path: Path | None
    """None if the request has no output."""
    image: Image.Image
    """8-bit RGB."""
    provenance: Provenance
    """How the image was made."""
    seconds: float
    """The image's share of the wall time of its batch."""
    candidates: Candidates | None = None
    """All candidates, if the best of several was kept."""

    def record(self) -> dict[str, Any]:
        """The image as `--json` and job records describe it."""
        provenance = self.provenance
        record: dict[str, Any] = {
            "path": None if self.path is None else str(self.path),
            "prompt": provenance.prompt,
            "seed": provenance.seed,
            "adapter_scale": provenance.adapter_scale,
            "unet_samples": provenance.unet_samples,
            "seconds": round(self.seconds, 3),
        }
        if self.candidates is not None:
            candidates = self.candidates
            record["best_of"] = {
                **candidates.summary(),
                "candidates": [score.record() for score in candidates.scores],
                "seconds": round(sum(image.seconds for image in candidates.images), 3),
            }
        return record


@dataclass(frozen=True)
class RunFinished:
    """All images are finished."""

    images: int
    grid: Path | None = None
    """The contact sheet, if the request has one."""


Event: TypeAlias = (
    RunStarted
    | DownloadStarted
    | DownloadProgress
    | VerifyProgress
    | FileFinished
    | IdentityReady
    | ModelsReady
    | StepFinished
    | ImageFinished
    | RunFinished
)
