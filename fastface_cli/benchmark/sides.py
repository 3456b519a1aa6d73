"""The sides of a comparison: a recipe, run by our pipeline or by the published structure."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ..models.acceleration import DEFAULT, Acceleration
from ..recipe.schema import Recipe
from ..settings import load_settings

if TYPE_CHECKING:
    import torch

    from ..app.pipeline import GeneratedImage, Request, StageTimer
    from ..app.stack import ModelStack
    from ..identity.identity import Identity
    from ..models.offload import LevelName

EngineName = Literal["ours", "reference"]
WeightSource = Literal["real", "random", "random-small"]

WEIGHTS: dict[WeightSource, str] = {
    "real": "the recipe's weights",
    "random": "random weights, full size",
    "random-small": "random weights, miniature",
}
"""Label of each source in reports."""


class BenchmarkEngine(Protocol):
    """Interface of both implementations."""

    recipe: Recipe
    parts: Any
    watch: StageTimer

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...

    def generate(self, requests: Sequence[Request], *, batch_size: int = 1) -> Iterator[GeneratedImage]:
        """Generate images, in order."""
        ...

    def example_identity(self) -> Identity:
        """An arbitrary identity with everything that the adapter reads."""
        ...


@dataclass(frozen=True)
class Side:
    """One configuration of a comparison."""

    label: str
    recipe: Recipe
    engine: EngineName = "ours"
    acceleration: Acceleration = field(default_factory=lambda: DEFAULT)
    low_memory: LevelName = "off"

    def weights_key(self) -> tuple[Any, ...]:
        """Return what determines the weights in memory; sides with the same key can share them."""
        faster = self.acceleration
        layout = (faster.fuse_lora, faster.fuse_qkv, faster.channels_last, faster.vae, faster.fp8)
        return (self.engine, self.recipe.digest(), self.low_memory, *layout)

    def to_json(self) -> dict[str, Any]:
        """Return the side for the report and for another process."""
        return {
            "label": self.label,
            "recipe": self.recipe.canonical(),
            "engine": self.engine,
            "acceleration": dict(self.acceleration.describe()),
            "low_memory": self.low_memory,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Side:
        """Restore a side from `to_json`."""
        return cls(
            data["label"],
            # As JSON: from Python objects, the strict model refuses strings as step numbers.
            Recipe.model_validate_json(json.dumps(data["recipe"])),
            data["engine"],
            Acceleration(**data["acceleration"]),
            data["low_memory"],
        )


@dataclass(frozen=True)
class Source:
    """Origin of the weights, and the device that runs them."""

    weights: WeightSource = "real"
    device: str = "auto"
    dtype: str | None = None
    offline: bool | None = None


def build(side: Side, source: Source) -> BenchmarkEngine:
    """Load or create the models of a side.

    Raises:
        FastFaceError: see `ModelStack` and `Pipeline.load`.
    """
    from ..app.pipeline import Pipeline
    from ..models.device import pick_device, pick_dtype
    from ..models.offload import LEVELS
    from . import random_stack
    from .reference import PublishedPipeline
    from .sdxl import MINIATURE, PUBLISHED

    device, level = pick_device(source.device), LEVELS[side.low_memory]
    if source.weights != "real":
        stack = PUBLISHED if source.weights == "random" else MINIATURE
        dtype = pick_dtype(source.dtype, device)
        if side.engine == "reference":
            return random_stack.random_reference(side.recipe, device, dtype, stack)
        return random_stack.random_pipeline(side.recipe, device, dtype, side.acceleration, stack, level)
    paths = _models(source).model_files(side.recipe)
    if side.engine == "reference":
        return PublishedPipeline.load(side.recipe, paths, device=source.device, dtype=source.dtype)
    return Pipeline.load(
        side.recipe,
        paths,
        device=source.device,
        dtype=source.dtype,
        acceleration=side.acceleration,
        level=level,
    )


def photo_reader(sides: Sequence[Side], source: Source, photo: Path) -> Callable[[], Identity]:
    """Load the models that read a photo: those of the first side, for what the adapters of all sides read.

    Raises:
        ModelUnavailableError: they cannot be downloaded or loaded.
    """
    from ..identity.features import NEEDED
    from ..identity.identity import make_identity

    models, recipes = _models(source), [side.recipe for side in sides]
    features = {name for recipe in recipes for name in NEEDED[recipe.adapter.kind]}
    with_tower = (recipe for recipe in recipes if "eva_hidden" in NEEDED[recipe.adapter.kind])
    analyzer, encoder = models.analyzer(recipes[0]), next(map(models.face_encoder, with_tower), None)
    return lambda: make_identity([photo], analyzer, features=features, encoder=encoder)


def _models(source: Source) -> ModelStack:
    from ..app.runtime import Runtime
    from ..app.stack import ModelStack

    return ModelStack(Runtime(source.device, source.dtype), load_settings(), offline=source.offline)


def ablation(recipe: Recipe, acceleration: Acceleration = DEFAULT) -> list[Side]:
    """Return a side with every optimization, one without each of them, and one without any.

    Optimizations that are disabled in `acceleration` have no side.
    """
    off = Acceleration.none()
    sides = [Side("everything", recipe, acceleration=acceleration)]
    for name, value in acceleration.describe().items():
        without = getattr(off, name)
        if value != without:
            sides.append(
                Side(f"without {name}", recipe, acceleration=replace(acceleration, **{name: without}))
            )
    return [*sides, Side("nothing", recipe, acceleration=off)]


def check_photo(photo: Path | None, weights: WeightSource) -> None:
    """Refuse a photo if there are no face models.

    Raises:
        UsageError: random weights have no face models.
    """
    from ..errors import UsageError

    if photo is not None and weights != "real":
        raise UsageError("random weights have no face models", "omit --face, or use --weights real")
