"""Machine settings, from the environment, the user's file or the defaults. None changes the images."""

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
"""GPU memory saving level."""


class Settings(BaseModel):
    """Settings of this machine and its user."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    home: Path = Path(platformdirs.user_cache_dir(APP, appauthor=False))
    """FASTFACE_HOME: folder of all files that fastface stores."""
    hub_cache: Path | None = None
    """HF_HUB_CACHE: folder of the Hugging Face cache; None is `home/hub`."""
    device: str = "auto"
    """FASTFACE_DEVICE: auto, cpu, cuda, cuda:1, mps."""
    recipe: str = "hyper-fastface"
    """FASTFACE_RECIPE: the default recipe."""
    verbosity: int = 0
    """FASTFACE_VERBOSITY: 0 is quiet, 1 prints progress details (same as -v)."""
    low_memory: Saving = "auto"
    """FASTFACE_LOW_MEMORY: GPU memory saving level; auto depends on the free memory."""
    fused_cache: Annotated[float, Field(ge=0)] = 20.0
    """FASTFACE_FUSED_CACHE: maximum GB of fused models cached on disk; 0 disables the cache."""

    @field_validator("low_memory", mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        """YAML reads 8 as a number and off as false."""
        return "off" if value is False else str(value)

    @property
    def hub_folder(self) -> Path:
        """Folder of the files from the Hugging Face Hub."""
        return self.hub_cache or self.home / "hub"


def config_path() -> Path:
    """Path of the user's settings file (YAML), which is optional."""
    return Path(platformdirs.user_config_dir(APP, appauthor=False)) / "config.yaml"


def load_settings() -> Settings:
    """Load the settings of this process.

    Raises:
        UsageError: the user's file or a FASTFACE_ variable is invalid.
    """
    path = config_path()
    values: dict[str, Any] = {}
    if path.is_file():
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"cannot read the settings file {path}: {reason}", "fix or remove it") from error
        if not isinstance(content, dict):
            raise UsageError(f"the settings file {path} must contain 'name: value' lines")
        values = content
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
