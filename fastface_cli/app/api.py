"""The Python use: a recipe, a person, images.

from fastface_cli import FastFace

face = FastFace("pocket")
me = face.identity("me.jpg")
face.generate(me, "a woman smiling, watercolour", seed=1)[0].save("out.png")
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..models.acceleration import DEFAULT, Acceleration
from ..recipe.schema import AdapterScale, Recipe
from ..settings import Saving, Settings
from .events import ImageFinished
from .request import GenerateRequest
from .runtime import Runtime
from .session import Session

if TYPE_CHECKING:
    from PIL import Image

    from ..identity.analyzer import FaceAnalyzer
    from ..identity.identity import Identity
    from .best_of import Best, Scorer
    from .pipeline import Pipeline


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
        )

    @property
    def pipeline(self) -> Pipeline:
        """The loaded diffusion models."""
        return self.session.stack.pipeline(self.recipe)

    @property
    def analyzer(self) -> FaceAnalyzer:
        """The loaded face models."""
        return self.session.stack.analyzer(self.recipe)

    @property
    def scorer(self) -> Scorer:
        """The scorer of candidates for `best_of`; logs a warning for each score that is unavailable."""
        return self.session.stack.scorer(self.recipe)

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
        return self.session.stack.identity(self.recipe, photos, face_index=face_index, face_box=face_box)

    def generate(
        self,
        identity: Identity,
        prompt: str,
        *,
        seed: int | None = None,
        count: int = 1,
        negative_prompt: str | None = None,
        adapter_scale: AdapterScale | None = None,
        batch_size: int = 1,
    ) -> list[Image.Image]:
        """Generate images of a person.

        Args:
            identity: the person.
            prompt: what the images show.
            seed: of the first image; the next images use the following seeds. None: the recipe's, or random.
            count: number of images.
            negative_prompt: None: the recipe's.
            adapter_scale: a constant, or one number per step; None: the recipe's.
            batch_size: number of images per UNet call.

        Returns:
            8-bit RGB images of the recipe's size.

        Raises:
            DeviceError: out of memory.
            ModelUnavailableError: a model cannot be downloaded or loaded.
        """
        request = GenerateRequest(
            prompts=(prompt,),
            negative_prompt=negative_prompt,
            seed=seed,
            count=count,
            adapter_scales=() if adapter_scale is None else (adapter_scale,),
            batch_size=batch_size,
            output=None,
        )
        return [image.image for image in self._run(request, identity)]

    def best_of(
        self,
        identity: Identity,
        prompt: str,
        *,
        n: int = 8,
        seed: int | None = None,
        negative_prompt: str | None = None,
        adapter_scale: AdapterScale | None = None,
        batch_size: int = 1,
    ) -> Best:
        """Of `n` images that follow the prompt, return the most similar to the person: see `best_of.choose`.

        Args:
            identity: the person.
            prompt: what the image shows.
            n: number of candidates.
            seed: of the first candidate; the next use the following seeds. None: the recipe's, or random.
            negative_prompt: None: the recipe's.
            adapter_scale: a constant, or one number per step; None: the recipe's.
            batch_size: number of images per UNet call.

        Raises:
            UsageError: fewer than one candidate, or more than a thousand.
            DeviceError: out of memory.
            ModelUnavailableError: a model cannot be downloaded or loaded.
        """
        from .best_of import MOST, Best

        if not 1 <= n <= MOST:
            raise UsageError(f"best of {n}: choose 1 to {MOST} candidates")
        request = GenerateRequest(
            prompts=(prompt,),
            negative_prompt=negative_prompt,
            seed=seed,
            best_of=n,
            adapter_scales=() if adapter_scale is None else (adapter_scale,),
            batch_size=batch_size,
            output=None,
        )
        (image,) = self._run(request, identity)
        seed = image.provenance.seed
        if image.candidates is not None:
            return Best(image.image, seed, image.candidates.scores, image.candidates.judge)
        score = self.scorer.score(image.image, identity=identity, prompt=prompt, seed=seed)
        return Best(image.image, seed, (score,), self.scorer.judge.name)

    def _run(self, request: GenerateRequest, identity: Identity) -> list[ImageFinished]:
        events = self.session.run(request, identity=identity)
        return [event for event in events if isinstance(event, ImageFinished)]
