"""What a worker does: a row and an identity in, a row and a picture out. It writes nothing."""

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
    """One image to make."""

    row: Row
    identity: Identity


@dataclass(frozen=True)
class ImageOutcome:
    """What became of a task: a picture, or the row's error says why not."""

    row: Row
    image: bytes | None
    """An encoded PNG."""


Make: TypeAlias = Callable[[ImageTask], ImageOutcome]
Factory: TypeAlias = Callable[[str], Make]
"""Device name to what makes images on it; called once in each worker, and therefore picklable."""


@dataclass(frozen=True)
class MakerFactory:
    """How workers come to their models."""

    recipes: Mapping[str, Recipe]
    dtype: str | None = None
    offline: bool | None = None
    threads: int = 1
    """Torch threads of a worker."""

    def __call__(self, device: str) -> Make:
        return Maker(self, device)


class Maker:
    """Makes images on one device, with one recipe's models in memory.

    Args:
        setup: the recipes.
        device: as torch names it.
    """

    def __init__(self, setup: MakerFactory, device: str) -> None:
        import torch

        torch.set_num_threads(setup.threads)
        self.setup = setup
        self.device = device
        self._face: FastFace | None = None
        self._pipeline: Pipeline | None = None

    def __call__(self, task: ImageTask) -> ImageOutcome:
        """Make one image; what goes wrong with it is recorded in its row.

        Raises:
            FastFaceError: the models cannot be loaded: no image of the recipe could be made.
        """
        from ..app.pipeline import Request
        from ..output.images import encode_png
        from ..output.metadata import describe_made

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
        """The pipeline of a recipe; models that it shares with the last one stay."""
        from ..app.api import FastFace

        if self._pipeline is not None and self._pipeline.recipe == recipe:
            return self._pipeline
        face = FastFace(recipe, device=self.device, dtype=self.setup.dtype, offline=self.setup.offline)
        if self._pipeline is not None:
            try:
                self._pipeline = self._pipeline.with_recipe(recipe, face.paths(faces=False))
            except RecipeError:
                self._face = self._pipeline = None  # room for other models
        if self._pipeline is None:
            self._face = face
            self._pipeline = face.pipeline
        self._warm_up(self._pipeline, task)
        return self._pipeline

    def _warm_up(self, pipeline: Pipeline, task: ImageTask) -> None:
        """One picture that nobody sees, so that the first one's seconds hold no compilation."""
        from ..app.pipeline import Request

        try:
            next(iter(pipeline.generate([Request(task.row.prompt, 0, task.identity)])))
        except Exception:
            return  # the image itself will say what is wrong


def failed(row: Row, error: BaseException) -> ImageOutcome:
    """A row that records why its picture could not be made."""
    return ImageOutcome(replace(row, file=None, error=error_record(error)), None)


def error_record(error: BaseException) -> dict[str, Any]:
    """An exception as rows hold it."""
    return (error if isinstance(error, FastFaceError) else unexpected(error)).record()
