"""Generate images in a worker: row and identity in, row and image out. Workers write no files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import FastFaceError, RecipeError, unexpected
from .rows import Row

if TYPE_CHECKING:
    from ..app.api import FastFace
    from ..app.pipeline import Pipeline
    from ..identity.identity import Identity
    from ..recipe.schema import Recipe


@dataclass(frozen=True)
class ImageTask:
    """One image to generate."""

    row: Row
    identity: Identity


@dataclass(frozen=True)
class ImageOutcome:
    """The result of a task: an image, or a row with an error."""

    row: Row
    image: bytes | None
    """An encoded PNG."""


Make: TypeAlias = Callable[[ImageTask], ImageOutcome]
Factory: TypeAlias = Callable[[str], Make]
"""Creates the image maker of a device; called once in each worker, and therefore picklable."""


@dataclass(frozen=True)
class MakerFactory:
    """What workers need to load their models; picklable."""

    recipes: Mapping[str, Recipe]
    dtype: str | None = None
    offline: bool | None = None
    threads: int = 1
    """Torch threads per worker."""

    def __call__(self, device: str) -> Make:
        return Maker(self, device)


class Maker:
    """Generate images on one device, with the models of one recipe in memory.

    Args:
        setup: the recipes.
        device: torch device name.
    """

    def __init__(self, setup: MakerFactory, device: str) -> None:
        import torch

        torch.set_num_threads(setup.threads)
        self.setup = setup
        self.device = device
        self._face: FastFace | None = None
        self._pipeline: Pipeline | None = None

    def __call__(self, task: ImageTask) -> ImageOutcome:
        """Generate one image and record its errors in the row.

        Raises:
            FastFaceError: the models cannot be loaded, so that no image of the recipe can be generated.
        """
        from ..app.pipeline import Request
        from ..app.provenance import describe_made
        from ..output.images import encode_png

        recipe = self.setup.recipes[task.row.recipe]
        pipeline = self._ready(recipe, task)
        try:
            request = Request(task.row.prompt, task.row.seed, task.identity, recipe.negative_prompt)
            image = next(iter(pipeline.generate([request])))
            row = replace(task.row, seconds=round(image.seconds, 6), unet_samples=image.unet_samples)
            return ImageOutcome(row, encode_png(image.image, describe_made(recipe, image)))
        except Exception as error:
            return failed(task.row, error)

    def _ready(self, recipe: Recipe, task: ImageTask) -> Pipeline:
        """Return the pipeline of a recipe; models shared with the previous recipe stay loaded."""
        from ..app.api import FastFace

        if self._pipeline is not None and self._pipeline.recipe == recipe:
            return self._pipeline
        face = FastFace(recipe, device=self.device, dtype=self.setup.dtype, offline=self.setup.offline)
        if self._pipeline is not None:
            try:
                self._pipeline = self._pipeline.with_recipe(recipe, face.paths(faces=False))
            except RecipeError:
                self._face = self._pipeline = None  # free memory for other models
        if self._pipeline is None:
            self._face = face
            self._pipeline = face.pipeline
        self._warm_up(self._pipeline, task)
        return self._pipeline

    def _warm_up(self, pipeline: Pipeline, task: ImageTask) -> None:
        """Generate and discard one image, so that the time of the first image excludes compilation."""
        from ..app.pipeline import Request

        try:
            next(iter(pipeline.generate([Request(task.row.prompt, 0, task.identity)])))
        except Exception:
            return  # the image itself will report the error


def failed(row: Row, error: BaseException) -> ImageOutcome:
    """Return the row of a failed image with its error."""
    return ImageOutcome(replace(row, file=None, error=error_record(error)), None)


def error_record(error: BaseException) -> dict[str, Any]:
    """Return an exception as recorded in rows."""
    return (error if isinstance(error, FastFaceError) else unexpected(error)).record()
