"""A row: one image of a run. Runs store rows as JSON lines."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter


@dataclass(frozen=True)
class Row:
    """One image of a run: inputs, result and scores. Paths are relative to the run."""

    key: str
    """RECIPE/IDENTITY/PROMPTINDEX-SEEDINDEX, with `+STRESS` if the reference is degraded."""
    recipe: str
    identity: str
    prompt: str
    prompt_index: int
    seed_index: int
    seed: int
    """Depends on identity, prompt and seed index only (`image_seed`), so that recipes are compared in
    pairs."""
    stress: str | None = None
    """Degradation of the reference photos; None for the original photos."""
    attributes: dict[str, str] = field(default_factory=dict)
    """Free columns of the data set, such as {"light": "dim"}."""
    reference: str = ""
    """The photo that scores compare with (the first of several). It conditions unless `degraded` is set."""
    degraded: str | None = None
    """The degraded reference, which conditioned instead."""
    held_out: str | None = None
    """A photo of the same person that is used for scores only."""
    file: str | None = None
    """The image; None if generation failed."""
    sha256: str | None = None
    """Hash (hex) of the image file; None in rows of earlier versions."""
    size: int | None = None
    """Bytes of the image file; None in rows of earlier versions."""
    error: dict[str, Any] | None = None
    """Why generation failed: {"kind", "code", "message", "hint"}."""
    seconds: float | None = None
    """Generation time."""
    unet_samples: int | None = None
    """Number of UNet samples."""
    scores: dict[str, float | None] = field(default_factory=dict)
    """By column; None if there is no value. Empty until scored."""

    def to_json(self) -> dict[str, Any]:
        """Return JSON-compatible data; numbers that are not finite become None."""
        data = dataclasses.asdict(self)
        data["scores"] = {name: finite(value) for name, value in self.scores.items()}
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        """Create a row from JSON data; unknown fields of later versions are ignored.

        Raises:
            ValidationError: a field is missing or has the wrong type.
        """
        names = {entry.name for entry in dataclasses.fields(cls)}
        return _ROW.validate_python({name: value for name, value in data.items() if name in names})


_ROW = TypeAdapter(Row)


def finite(value: float | None) -> float | None:
    """Return the number, or None if JSON cannot represent it."""
    return value if value is not None and math.isfinite(value) else None


def row_key(recipe: str, identity: str, prompt_index: int, seed_index: int, stress: str | None = None) -> str:
    """Return the key of an image in its run."""
    key = f"{recipe}/{identity}/{prompt_index:04d}-{seed_index}"
    return key if stress is None else f"{key}+{stress}"


def image_seed(identity: str, prompt: str, seed_index: int) -> int:
    """Return the seed of one image, in [0, 2**32): independent of order, shard and recipe."""
    text = json.dumps([identity, prompt, seed_index])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
