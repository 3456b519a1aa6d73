"""The bodies of the native API, and what they become."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from ..app.request import AnyText, GenerateRequest, OutputPlan, Prompt, RecipeChange
from ..errors import UsageError, nearest
from ..identity.analyzer import Box
from ..recipe.files import recipe_names
from ..recipe.schema import AdapterScale
from .limits import Limits

NumberValue = float | int | list[float] | None


class RunBody(BaseModel):
    """One run, as a client describes it: `GenerateRequest` without anything that names a file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: AnyText | None = None
    """Name of a recipe; None is the server's default."""
    prompts: Annotated[tuple[Prompt, ...], Field(min_length=1, max_length=64)]
    negative_prompt: Prompt | None = None
    """None: the recipe's."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Seed of the first image; None: the recipe's, or a random one."""
    count: Annotated[int, Field(ge=1, le=64)] = 1
    """Images per prompt."""
    best_of: Annotated[int, Field(ge=1, le=64)] = 1
    """Candidates per image; the best one is kept."""
    adapter_scales: Annotated[tuple[AdapterScale, ...], Field(max_length=64)] = ()
    """One image per scale; empty: the recipe's scale."""
    aspect: tuple[Annotated[int, Field(ge=1, le=64)], Annotated[int, Field(ge=1, le=64)]] | None = None
    """Ratio of width and height."""
    face_index: Annotated[int, Field(ge=0, le=1000)] | None = None
    face_box: Box | None = None
    """Left, top, right, bottom in pixels of the upright photo."""
    identity: AnyText | None = None
    """Name of a saved identity, instead of photos."""
    changes: dict[AnyText, NumberValue] = {}
    """Dotted recipe field -> its value; the server limits which fields."""
    previews: bool = False
    """Send a small preview of every step."""

    def request(self, limits: Limits, default: str, output: Path | None) -> GenerateRequest:
        """The run that this body describes.

        Args:
            limits: of the server.
            default: recipe of bodies that name none.
            output: folder for the images; None keeps them in memory.

        Raises:
            UsageError: there is no such recipe or field, or the run is too large.
        """
        images = len(self.prompts) * self.count * self.best_of * max(1, len(self.adapter_scales))
        if images > limits.images:
            raise UsageError(f"the run has {images} images, the limit is {limits.images}", "split the run")
        longest = max(map(len, (*self.prompts, self.negative_prompt or "")))
        if longest > limits.prompt_characters:
            raise UsageError(f"a prompt has {longest} characters, the limit is {limits.prompt_characters}")
        for field in self.changes:
            if field not in limits.fields:
                near = nearest(field, limits.fields)
                raise UsageError(
                    f"the field '{field[:100]}' cannot be set over HTTP",
                    f"did you mean '{near}'?" if near else f"fields are {', '.join(limits.fields)}",
                )
        return GenerateRequest(
            recipe=registered(self.recipe or default),
            changes={
                field: RecipeChange(value=value, origin="changes") for field, value in self.changes.items()
            },
            prompts=self.prompts,
            negative_prompt=self.negative_prompt,
            seed=self.seed,
            count=self.count,
            best_of=self.best_of,
            adapter_scales=self.adapter_scales,
            aspect=self.aspect,
            output=None if output is None else OutputPlan(path=f"{output}/"),
        )


def registered(name: str) -> str:
    """The name of a shipped recipe, checked: a client can never name a file.

    Raises:
        UsageError: there is no such recipe.
    """
    names = recipe_names()
    if name not in names:
        near = nearest(name[:100], names)
        raise UsageError(
            f"there is no recipe '{name[:100]}'", f"did you mean '{near}'?" if near else "see /api/recipes"
        )
    return name


class ErrorRecord(BaseModel):
    """An error, as every command of fastface reports it."""

    kind: str
    code: int
    message: str
    hint: str | None = None


class ErrorBody(BaseModel):
    """The body of every failed call."""

    error: ErrorRecord


class ImageRecord(BaseModel):
    """A finished image of a run."""

    index: int
    seed: int
    prompt: str
    negative_prompt: str | None
    adapter_scale: float | tuple[float, ...]
    recipe: str
    width: int
    height: int
    unet_samples: int
    seconds: float
    bytes: int
    url: str


class RunRecord(BaseModel):
    """A run and its results so far."""

    id: str
    state: str
    """queued, running, finished, failed or cancelled"""
    position: int | None
    """Runs ahead in the queue."""
    request: dict[str, Any]
    recipe: str
    width: int
    """Of the images, as `height`: the request's or the recipe's, in pixels."""
    height: int
    notices: list[str]
    """Messages so far, each once."""
    created: float
    """Seconds since 1970, as `started` and `ended`."""
    started: float | None
    ended: float | None
    error: ErrorRecord | None
    images: list[ImageRecord]


class RunList(BaseModel):
    """Runs, the newest first."""

    runs: list[RunRecord]


class FaceRecord(BaseModel):
    """A detected face, in pixels of the upright photo."""

    box: Box
    score: float


class FaceList(BaseModel):
    """The faces of a photo, the largest first."""

    width: int
    height: int
    faces: list[FaceRecord]


class IdentityRecord(BaseModel):
    """A saved identity."""

    name: str
    photos: int
    digest: str
    features: list[str]


class IdentityList(BaseModel):
    """Saved identities, sorted by name."""

    identities: list[IdentityRecord]


class RecipeRecord(BaseModel):
    """A recipe; recipes of one `model` and `adapter` form a family that differs in `method`."""

    name: str
    short: str | None
    summary: str
    model: str
    adapter: str
    method: str | None
    width: int
    height: int
    steps: int
    default: bool
    adapter_scale: float | tuple[float, ...]
    download_bytes: int
    missing_bytes: int
    commercial: str


class RecipeList(BaseModel):
    """All recipes."""

    recipes: list[RecipeRecord]


class PartRecord(BaseModel):
    """The license of a model part."""

    role: str
    name: str
    license: str
    commercial: str
    page: str
    note: str | None


class LicenseList(BaseModel):
    """The licenses of a recipe's parts."""

    recipe: str
    parts: list[PartRecord]


class QueueRecord(BaseModel):
    """The queue."""

    waiting: int
    running: int
    limit: int


class StatusRecord(BaseModel):
    """The state of the server."""

    version: str
    recipe: str
    loaded: str | None
    device: str
    queue: QueueRecord
    findings: list[dict[str, Any]]
    limits: dict[str, int]
    adjustable: list[str]
