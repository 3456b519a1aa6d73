"""Machine settings: environment over user file over defaults. Nothing here changes a pixel."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import platformdirs
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from .errors import UsageError, nearest

APP = "fastface"
Saving: TypeAlias = Literal["auto", "off", "12", "8", "6"]
"""How a stack is fitted into a card's memory: see `memory.LEVELS`."""


class Settings(BaseModel):
    """What is true of this machine and its user."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    home: Path = Path(platformdirs.user_cache_dir(APP, appauthor=False))
    """Folder that holds everything fastface keeps; FASTFACE_HOME."""
    hub_cache: Path | None = None
    """Folder of the Hugging Face cache when the user set HF_HUB_CACHE; else `home/hub`."""
    device: str = "auto"
    """FASTFACE_DEVICE: auto, cpu, cuda, cuda:1, mps."""
    recipe: str = "hyper-fastface"
    """FASTFACE_RECIPE: the recipe used when none is named."""
    verbosity: int = 0
    """FASTFACE_VERBOSITY: 0 quiet, 1 what is done (same as -v)."""
    low_memory: Saving = "auto"
    """FASTFACE_LOW_MEMORY: how a stack is fitted into the card's memory; auto asks how much is free."""
    fused_cache: Annotated[float, Field(ge=0)] = 20.0
    """FASTFACE_FUSED_CACHE: GB on the disk for fused models kept between runs; 0 keeps none."""

    @field_validator("low_memory", mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        """YAML reads 8 as a number and off as false."""
        return "off" if value is False else str(value)

    @property
    def hub_folder(self) -> Path:
        """Where files of the Hugging Face Hub live."""
        return self.hub_cache or self.home / "hub"


def config_path() -> Path:
    """The user's settings file (YAML); it need not exist."""
    return Path(platformdirs.user_config_dir(APP, appauthor=False)) / "config.yaml"


def load_settings() -> Settings:
    """Settings of this process.

    Raises:
        UsageError: the user file or a FASTFACE_ variable holds something unknown.
    """
    path = config_path()
    values: dict[str, Any] = {}
    if path.is_file():
        try:
            read = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(
                f"cannot read the settings file {path}: {reason}", "mend or remove it"
            ) from error
        if not isinstance(read, dict):
            raise UsageError(f"the settings file {path} must hold 'name: value' lines")
        values = read
    for key in ("home", "device", "recipe", "verbosity", "low_memory", "fused_cache"):
        value = os.environ.get(f"FASTFACE_{key.upper()}")
        if value:
            values[key] = value
    hub_cache = os.environ.get("HF_HUB_CACHE")
    if hub_cache:
        values["hub_cache"] = hub_cache
    for key in ("home", "hub_cache"):
        if isinstance(values.get(key), str):
            values[key] = Path(values[key]).expanduser()
    try:
        return Settings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0])
        near = nearest(field, Settings.model_fields)
        if first["type"] == "extra_forbidden":
            raise UsageError(
                f"there is no setting '{field}' ({path})",
                f"did you mean '{near}'?" if near else f"settings are {', '.join(Settings.model_fields)}",
            ) from error
        raise UsageError(f"setting '{field}' ({path} or FASTFACE_{field.upper()}): {first['msg']}") from error
