"""A row: one image of a run. Runs hold them as JSON lines, and everything after reads them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One image of a run: what it is of, how it came out, what it scored. Paths are relative to the run."""

    key: str
    """RECIPE/IDENTITY/PROMPTINDEX-SEEDINDEX, and `+STRESS` where the reference was degraded."""
    recipe: str
    identity: str
    prompt: str
    prompt_index: int
    seed_index: int
    seed: int
    """Of identity, prompt and seed index alone (`image_seed`), so that recipes are compared in pairs."""
    stress: str | None = None
    """How the reference photos were degraded; None: not at all."""
    attributes: dict[str, str] = field(default_factory=dict)
    """Free columns of the dataset, as {"light": "dim"}."""
    reference: str = ""
    """The photo that is scored against (the first of several), and that conditions unless `degraded` does."""
    degraded: str | None = None
    """What `stress` made of the reference: the photo that conditioned in its place."""
    held_out: str | None = None
    """A photo of the same person that scores and does not condition."""
    file: str | None = None
    """The picture; None where it could not be made."""
    error: dict[str, Any] | None = None
    """Why it could not be made: {"kind", "code", "message", "hint"}."""
    seconds: float | None = None
    """Time to make it."""
    unet_samples: int | None = None
    """Samples that went through the UNet."""
    scores: dict[str, float | None] = field(default_factory=dict)
    """By column; None: it could not be measured. Empty until it is scored."""

    def to_json(self) -> dict[str, Any]:
        """Plain data for one JSON line; numbers that are not finite become null."""
        data = dataclasses.asdict(self)
        data["scores"] = {name: finite(value) for name, value in self.scores.items()}
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        """A row from plain data; fields of a later version are passed over.

        Raises:
            TypeError: a field without a default is missing.
        """
        names = {entry.name for entry in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in data.items() if name in names})


def finite(value: float | None) -> float | None:
    """The number, or None where JSON could not hold it."""
    return value if value is not None and math.isfinite(value) else None


def row_key(recipe: str, identity: str, prompt_index: int, seed_index: int, stress: str | None = None) -> str:
    """The name of an image in its run."""
    key = f"{recipe}/{identity}/{prompt_index:04d}-{seed_index}"
    return key if stress is None else f"{key}+{stress}"


def image_seed(identity: str, prompt: str, seed_index: int) -> int:
    """The seed of one image, in [0, 2**32): the same in any order, on any shard, for any recipe."""
    text = json.dumps([identity, prompt, seed_index])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
