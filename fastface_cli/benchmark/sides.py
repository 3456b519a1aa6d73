"""What is compared: a recipe, run by our engine or by the published structure."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ..models.acceleration import DEFAULT, Acceleration
from ..recipe.schema import Recipe

if TYPE_CHECKING:
    import torch

    from ..app.pipeline import Picture, Request, StageTimer
    from ..identity.analyzer import FaceAnalyzer
    from ..models.offload import LevelName

EngineName = Literal["ours", "reference"]
Weights = Literal["real", "random", "random-small"]

WEIGHTS: dict[Weights, str] = {
    "real": "the recipe's weights",
    "random": "random weights, full size",
    "random-small": "random weights, miniature",
}
"""How each kind is named wherever a number made with it stands."""


class Engine(Protocol):
    """What both implementations have in common."""

    recipe: Recipe
    parts: Any
    device: torch.device
    dtype: torch.dtype
    watch: StageTimer

    def generate(
        self,
        requests: Sequence[Request],
        *,
        batch_size: int = 1,
        on_step: Callable[[int], None] = ...,
    ) -> Iterator[Picture]:
        """Make pictures, in order."""
        ...


@dataclass(frozen=True)
class Side:
    """One of the things that are compared."""

    label: str
    recipe: Recipe
    engine: EngineName = "ours"
    acceleration: Acceleration = field(default_factory=lambda: DEFAULT)
    low_memory: LevelName = "off"

    def weights_key(self) -> tuple[Any, ...]:
        """What decides the numbers in memory and their layout: sides of one key may share them."""
        faster = self.acceleration
        layout = (faster.fuse_lora, faster.channels_last, faster.vae, faster.fp8)
        return (self.engine, self.recipe.digest(), self.low_memory, *layout)

    def to_json(self) -> dict[str, Any]:
        """For the report, and for a process of its own."""
        return {
            "label": self.label,
            "recipe": self.recipe.canonical(),
            "engine": self.engine,
            "acceleration": dict(self.acceleration.describe()),
            "low_memory": self.low_memory,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Side:
        """The inverse of `to_json`."""
        return cls(
            data["label"],
            # As JSON: in Python a strict model takes no text for the steps that some parts are chosen by.
            Recipe.model_validate_json(json.dumps(data["recipe"])),
            data["engine"],
            Acceleration(**data["acceleration"]),
            data["low_memory"],
        )


@dataclass(frozen=True)
class Source:
    """Where weights come from, and what they are run on."""

    weights: Weights = "real"
    device: str = "auto"
    dtype: str | None = None
    offline: bool | None = None


def build(side: Side, source: Source) -> Engine:
    """The models of a side, loaded or made.

    Raises:
        FastFaceError: as of `FastFace` and `Pipeline.load`.
    """
    from ..app.pipeline import Pipeline
    from ..models.device import pick_device, pick_dtype
    from ..models.offload import LEVELS
    from . import random_stack
    from .reference import Reference
    from .sdxl import MINIATURE, PUBLISHED

    device, level = pick_device(source.device), LEVELS[side.low_memory]
    if source.weights != "real":
        stack = PUBLISHED if source.weights == "random" else MINIATURE
        dtype = pick_dtype(source.dtype, device)
        if side.engine == "reference":
            return random_stack.random_reference(side.recipe, device, dtype, stack)
        return random_stack.random_pipeline(side.recipe, device, dtype, side.acceleration, stack, level)
    paths = _face(side, source).paths(faces=False)
    if side.engine == "reference":
        return Reference.load(side.recipe, paths, device=source.device, dtype=source.dtype)
    return Pipeline.load(
        side.recipe,
        paths,
        device=source.device,
        dtype=source.dtype,
        acceleration=side.acceleration,
        level=level,
    )


def analyzer(side: Side, source: Source) -> FaceAnalyzer:
    """The face models of a side's recipe.

    Raises:
        ModelUnavailableError: they cannot be had or loaded.
    """
    found: FaceAnalyzer = _face(side, source).analyzer
    return found


def _face(side: Side, source: Source) -> Any:
    from ..app.api import FastFace

    return FastFace(side.recipe, device=source.device, dtype=source.dtype, offline=source.offline)


def ablation(recipe: Recipe, acceleration: Acceleration = DEFAULT) -> list[Side]:
    """A side for everything on, one for each item turned off alone, one for everything off.

    Items that are off in `acceleration` have no row: they take no part in it.
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


def check_photo(photo: Path | None, weights: Weights) -> None:
    """Refuse a photo that no face model would see.

    Raises:
        UsageError: random weights have no face models.
    """
    from ..errors import UsageError

    if photo is not None and weights != "real":
        raise UsageError("random weights have no face models", "leave out --face, or take --weights real")
