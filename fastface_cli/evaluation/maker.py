"""Generate images in a worker: row and identity in, row and image out. Workers write no files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import FastFaceError, RecipeError, unexpected
from .rows import Row

if TYPE_CHECKING:
    from ..app.events import ImageFinished
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

        from ..app.runtime import Runtime
        from ..app.session import Session

        torch.set_num_threads(setup.threads)
        self.setup = setup
        self._session = Session(runtime=Runtime(device, setup.dtype), offline=setup.offline)
        self._recipe: Recipe | None = None

    def __call__(self, task: ImageTask) -> ImageOutcome:
        """Generate one image and record its errors in the row.

        Raises:
            FastFaceError: the models cannot be loaded, so that no image of the recipe can be generated.
        """
        from ..output.images import encode_png
        from ..output.metadata import describe

        self._prepare(task)
        try:
            image = self._generate(task, task.row.seed)
            samples = image.provenance.unet_samples
            row = replace(task.row, seconds=round(image.seconds, 6), unet_samples=samples)
            return ImageOutcome(row, encode_png(image.image, describe(image.provenance)))
        except Exception as error:
            return failed(task.row, error)

    def _prepare(self, task: ImageTask) -> None:
        """Load the models of a recipe; models shared with the previous recipe stay loaded."""
        recipe = self.setup.recipes[task.row.recipe]
        if recipe == self._recipe:
            return
        try:
            self._session.stack.pipeline(recipe)
        except RecipeError:
            self._session.close()  # free memory for other models
            self._session.stack.pipeline(recipe)
        self._session.recipe = self._recipe = recipe
        # One discarded image, so that the time of the first image excludes compilation.
        with contextlib.suppress(Exception):  # the image itself reports the error
            self._generate(task, 0)

    def _generate(self, task: ImageTask, seed: int) -> ImageFinished:
        from ..app.events import ImageFinished
        from ..app.request import GenerateRequest

        request = GenerateRequest(prompts=(task.row.prompt,), seed=seed, output=None)
        events = self._session.run(request, identity=task.identity)
        (image,) = [event for event in events if isinstance(event, ImageFinished)]
        return image


def failed(row: Row, error: BaseException) -> ImageOutcome:
    """Return the row of a failed image with its error."""
    return ImageOutcome(replace(row, file=None, error=error_record(error)), None)


def error_record(error: BaseException) -> dict[str, Any]:
    """Return an exception as recorded in rows."""
    return (error if isinstance(error, FastFaceError) else unexpected(error)).record()
