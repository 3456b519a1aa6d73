"""Stress tests: degraded reference photos, deterministic for each person."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from PIL import Image, ImageFilter

from ..errors import UsageError, nearest
from ..identity.analyzer import Box

BLUR = 0.08
"""Standard deviation of the blur, relative to the width of the face."""
LIGHT, NOISE = 0.15, 6.0
"""Remaining share of the light, and the standard deviation of the sensor noise in 8-bit steps."""
COVER = 0.4
"""Height of the band that covers a part of the face, relative to the height of the face."""
QUALITY = 8
"""JPEG quality, 1 to 100."""
SMALL = 32
"""Width of the face in pixels."""


def blur(image: Image.Image, face: Box, _random: np.random.Generator) -> Image.Image:
    """Blur the photo."""
    return image.filter(ImageFilter.GaussianBlur(BLUR * (face[2] - face[0])))


def low_light(image: Image.Image, _face: Box, random: np.random.Generator) -> Image.Image:
    """Darken the photo in linear light and add noise."""
    linear = (np.asarray(image, np.float32) / 255) ** 2.2 * LIGHT
    noisy = linear ** (1 / 2.2) * 255 + random.normal(0, NOISE, linear.shape)
    return Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))


def occlusion(image: Image.Image, face: Box, random: np.random.Generator) -> Image.Image:
    """Cover the eyes, or mouth and nose, with a gray band; which one depends on the person."""
    left, top, right, bottom = face
    height = bottom - top
    start = top + height * (0.2 if random.random() < 0.5 else 0.55)
    covered = image.copy()
    covered.paste((96, 96, 96), (round(left), round(start), round(right), round(start + COVER * height)))
    return covered


def jpeg(image: Image.Image, _face: Box, _random: np.random.Generator) -> Image.Image:
    """Compress the photo strongly."""
    data = io.BytesIO()
    image.save(data, format="JPEG", quality=QUALITY)
    return Image.open(data).convert("RGB")


def small(image: Image.Image, face: Box, _random: np.random.Generator) -> Image.Image:
    """Shrink the photo, as if taken from far away; never enlarge it."""
    scale = min(1.0, SMALL / (face[2] - face[0]))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


Degrade = Callable[[Image.Image, Box, np.random.Generator], Image.Image]
STRESSES: Mapping[str, Degrade] = MappingProxyType(
    {"blur": blur, "lowlight": low_light, "occlusion": occlusion, "jpeg": jpeg, "small": small}
)


def degrade(image: Image.Image, stress: str, identity: str, face: Box) -> Image.Image:
    """Degrade a reference photo.

    Args:
        image: upright RGB.
        stress: a name of `STRESSES`.
        identity: name of the person; noise and position depend on it only.
        face: the person's face in pixels of `image`.
    """
    seed = int.from_bytes(hashlib.sha256(f"{stress}/{identity}".encode()).digest()[:8], "big")
    return STRESSES[stress](image, face, np.random.default_rng(seed))


def parse_stresses(text: str) -> tuple[str, ...]:
    """Parse names such as `blur,jpeg`; each once, in the order of `STRESSES`.

    Raises:
        UsageError: an unknown name.
    """
    names = {part.strip() for part in text.split(",") if part.strip()}
    for name in sorted(names - STRESSES.keys()):
        near = nearest(name, STRESSES)
        raise UsageError(
            f"unknown stress '{name}'",
            f"did you mean '{near}'?" if near else f"use {', '.join(STRESSES)}",
        )
    return tuple(name for name in STRESSES if name in names)
