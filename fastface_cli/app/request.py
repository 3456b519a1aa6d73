"""The complete description of a run: a frozen value that serializes to JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator

from ..errors import UsageError
from ..recipe.schema import AdapterScale


def encodable(text: object) -> str:
    """The text without lone surrogates (bytes that are not UTF-8), which no tokenizer accepts."""
    return _any_text(text).encode("utf-8", "replace").decode()


def _any_text(value: object) -> str:
    # File names may contain lone surrogates, which pydantic's own string type refuses.
    if not isinstance(value, str):
        raise ValueError("must be text")
    return value


AnyText = Annotated[str, PlainValidator(_any_text)]
Prompt = Annotated[str, PlainValidator(encodable)]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RecipeChange(_Frozen):
    """One recipe field set by the caller, and the name that errors give its origin (`--steps`)."""

    value: Any
    origin: AnyText


class OutputPlan(_Frozen):
    """Where the images are written, and which other files."""

    path: AnyText | None = None
    """File, folder or template such as `{recipe}-{seed}.png`; None: the current folder."""
    force: bool = False
    """Replace existing files."""
    metadata: bool = True
    """Write recipe, prompt and seed into each PNG."""
    grid: bool = False
    """Also write a contact sheet of all images."""
    save_latents: Path | None = None
    save_identity: Path | None = None


class GenerateRequest(_Frozen):
    """One run: recipe and changes to it, person, prompts, seeds, and where the images go."""

    recipe: AnyText | None = None
    """Name or file; None: the default recipe of the session."""
    changes: dict[str, RecipeChange] = {}
    """Dotted recipe field -> its value."""
    overrides: tuple[AnyText, ...] = ()
    """`field=VALUE` with VALUE in YAML; applied after `changes`."""
    stack: Path | None = None
    """Folder of local weights that replaces the recipe's models."""
    replay: Path | None = None
    """A PNG made by fastface; its recipe, prompt and seed are the defaults of this run."""
    allow_hub: bool = False
    """Download Hub repositories that the replayed image names and the manifest does not contain."""
    photos: tuple[Path, ...] = ()
    """Photos of one person."""
    identity: Path | None = None
    """A saved identity instead of photos."""
    face_index: Annotated[int, Field(ge=0)] | None = None
    face_box: tuple[float, float, float, float] | None = None
    """Left, top, right, bottom in pixels of the upright photo."""
    pose: Path | None = None
    """Photo whose face gives the pose, for InstantID; None: the pose of the person's photo."""
    prompts: tuple[Prompt, ...] = ()
    """Empty: the recipe's prompt."""
    negative_prompt: Prompt | None = None
    """None: the recipe's."""
    seed: int | None = None
    """Seed of the first image; None: the recipe's, or a random one."""
    count: Annotated[int, Field(ge=1, le=10000)] = 1
    """Images per prompt."""
    best_of: Annotated[int, Field(ge=1, le=1000)] = 1
    """Candidates per image; the best one is kept."""
    adapter_scales: tuple[AdapterScale, ...] = ()
    """One image per scale; empty: the recipe's scale."""
    aspect: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    """Ratio of width and height, at about as many pixels as the recipe's size."""
    batch_size: Annotated[int, Field(ge=1)] = 1
    commercial: bool = False
    """Refuse models whose license forbids commercial use."""
    output: OutputPlan | None = OutputPlan()
    """None: nothing is written; the images are only in the events."""

    @property
    def only_identity(self) -> bool:
        """Whether the run only saves an identity: a place to save it, and nothing to generate."""
        saves = self.output is not None and self.output.save_identity is not None
        return saves and not self.prompts and self.replay is None

    @model_validator(mode="after")
    def _one_source(self) -> GenerateRequest:
        """Pydantic does not wrap UsageError, so that its hint reaches the user."""
        if self.replay is not None and self.recipe is not None:
            raise UsageError("--from and --recipe both name a recipe", "leave one of them out")
        return self
