"""The Python use: a recipe, a person, images.

from fastface_cli import FastFace

face = FastFace("pocket")
me = face.identity("me.jpg")
face.generate(me, "a woman smiling, watercolour", seed=1)[0].save("out.png")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..models.acceleration import DEFAULT, Acceleration
from ..recipe.schema import Recipe
from ..settings import Saving, Settings
from .plan import random_seed
from .runtime import Runtime
from .session import Session

if TYPE_CHECKING:
    from PIL import Image

    from ..identity.analyzer import InsightFaceAnalyzer
    from ..identity.identity import Identity
    from .best_of import Best, Scorer
    from .pipeline import Pipeline, Request


class FastFace:
    """A recipe ready to run.

    Models are downloaded and loaded when they are first needed, and stay loaded.

    Args:
        recipe: name of a recipe, path of a recipe file, or a `Recipe`.
        overrides: changes to the recipe, such as "guidance.text=[1, 2, 2, 1]".
        stack: a folder of local weights instead of the recipe's models.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`; None takes the machine's setting.
        dtype: `float32`, `float16` or `bfloat16`; None chooses by device.
        offline: download nothing; None follows HF_HUB_OFFLINE.
        fused_cache: keep the fused models on disk, so that the next start is faster.
        low_memory: `off`, `12`, `8` or `6` (GB of the card), or `auto`; None takes the machine's setting.
        acceleration: optimizations; None is `Acceleration()`.
        remember: keep identities on disk, by the hash of their photos.
        progress: show progress on stderr when it is a terminal.
        settings: of this machine; None reads the settings file and the environment.

    Raises:
        RecipeError: the recipe is not valid.
    """

    def __init__(
        self,
        recipe: str | Recipe = "hyper-fastface",
        *,
        overrides: Sequence[str] = (),
        stack: Path | None = None,
        device: str | None = None,
        dtype: str | None = None,
        offline: bool | None = None,
        fused_cache: bool = True,
        low_memory: Saving | None = None,
        acceleration: Acceleration = DEFAULT,
        remember: bool = False,
        progress: bool = False,
        settings: Settings | None = None,
    ) -> None:
        from ..recipe.files import load_recipe

        if not isinstance(recipe, Recipe):
            recipe = load_recipe(recipe, overrides=overrides, stack=stack).recipe
        self.recipe = recipe
        self.session = Session(
            recipe,
            Runtime(device, dtype, low_memory, acceleration),
            settings=settings,
            offline=offline,
            fused_cache=fused_cache,
            remember=remember,
            progress=progress,
        )

    def paths(self, *, faces: bool) -> Mapping[str, Path]:
        """Where the model files are, by role; missing files are downloaded, face models only on request."""
        return self.session.paths(self.recipe, faces=faces)

    @property
    def pipeline(self) -> Pipeline:
        """The loaded stack."""
        return self.session.pipeline(self.recipe)

    @property
    def analyzer(self) -> InsightFaceAnalyzer:
        """The loaded face models."""
        return self.session.analyzer(self.recipe)

    @property
    def scorer(self) -> Scorer:
        """What scores candidates for `best_of`; logs what it cannot measure."""
        return self.session.scorer(self.recipe)

    def identity(
        self,
        *photos: str | Path | Image.Image,
        face_index: int | None = None,
        face_box: tuple[float, float, float, float] | None = None,
    ) -> Identity:
        """A person from one or several photos.

        Raises:
            UsageError: a photo cannot be read.
            NoFaceError: there is no usable face in them.
        """
        opened = tuple(Path(photo) if isinstance(photo, str) else photo for photo in photos)
        return self.session.identity(self.recipe, opened, face_index=face_index, face_box=face_box)

    def generate(
        self,
        identity: Identity,
        prompt: str,
        *,
        seed: int | None = None,
        count: int = 1,
        negative_prompt: str | None = None,
        adapter_scale: float | None = None,
        **options: Any,
    ) -> list[Image.Image]:
        """Images of a person.

        Args:
            identity: the person.
            prompt: what the image shows.
            seed: of the first image; the next images use the following seeds. None: random.
            count: number of images.
            negative_prompt: None is the recipe's.
            adapter_scale: None is the recipe's.
            options: of `Pipeline.generate`: `batch_size`, `on_step`.

        Returns:
            8-bit RGB images of the recipe's size.

        Raises:
            DeviceError: out of memory.
            ModelUnavailableError: a model cannot be downloaded or loaded.
        """
        requests = self._requests(identity, prompt, seed, count, negative_prompt, adapter_scale)
        return [drawn.image for drawn in self.pipeline.generate(requests, **options)]

    def best_of(
        self,
        identity: Identity,
        prompt: str,
        *,
        n: int = 8,
        seed: int | None = None,
        negative_prompt: str | None = None,
        adapter_scale: float | None = None,
        **options: Any,
    ) -> Best:
        """Of `n` images that follow the prompt, the one most similar to the person: see `best_of.choose`.

        Args:
            identity: the person.
            prompt: what the image shows.
            n: number of candidates.
            seed: of the first candidate; the next ones use the following seeds. None: random.
            negative_prompt: None is the recipe's.
            adapter_scale: None is the recipe's.
            options: of `Pipeline.generate`: `batch_size`, `on_step`.

        Raises:
            UsageError: fewer than one candidate, or more than a thousand.
            DeviceError: out of memory.
            ModelUnavailableError: a model cannot be downloaded or loaded.
        """
        from .best_of import MOST, Best, make_candidates

        if not 1 <= n <= MOST:
            raise UsageError(f"best of {n}: choose 1 to {MOST} candidates")
        requests = self._requests(identity, prompt, seed, n, negative_prompt, adapter_scale)
        candidates = make_candidates(self.pipeline, self.scorer, requests, **options)
        kept = candidates.images[candidates.kept]
        return Best(kept.image, kept.request.seed, candidates.scores, candidates.judge)

    def _requests(
        self,
        identity: Identity,
        prompt: str,
        seed: int | None,
        count: int,
        negative_prompt: str | None,
        adapter_scale: float | None,
    ) -> list[Request]:
        from .pipeline import Request

        first = random_seed() if seed is None else seed
        negative = self.recipe.negative_prompt if negative_prompt is None else negative_prompt
        return [Request(prompt, first + index, identity, negative, adapter_scale) for index in range(count)]
