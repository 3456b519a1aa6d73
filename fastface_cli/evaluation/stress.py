"""Stress: reference photos made worse, the same way for the same person every time."""

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
"""Standard deviation of the blur, as a share of the face's width."""
LIGHT, NOISE = 0.15, 6.0
"""Share of the light that is left, and the deviation of the noise of a dark sensor, in 8-bit steps."""
COVER = 0.4
"""Height of the band that covers a part of the face, as a share of the face's height."""
QUALITY = 8
"""JPEG quality, of 100."""
SMALL = 32
"""Width of the face in pixels."""


def blur(image: Image.Image, face: Box, _random: np.random.Generator) -> Image.Image:
    """Out of focus."""
    return image.filter(ImageFilter.GaussianBlur(BLUR * (face[2] - face[0])))


def low_light(image: Image.Image, _face: Box, random: np.random.Generator) -> Image.Image:
    """Underexposed in linear light, with noise."""
    linear = (np.asarray(image, np.float32) / 255) ** 2.2 * LIGHT
    noisy = linear ** (1 / 2.2) * 255 + random.normal(0, NOISE, linear.shape)
    return Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))


def occlusion(image: Image.Image, face: Box, random: np.random.Generator) -> Image.Image:
    """A grey band over the eyes or over mouth and nose; which one, the person decides."""
    left, top, right, bottom = face
    height = bottom - top
    start = top + height * (0.2 if random.random() < 0.5 else 0.55)
    covered = image.copy()
    covered.paste((96, 96, 96), (round(left), round(start), round(right), round(start + COVER * height)))
    return covered


def jpeg(image: Image.Image, _face: Box, _random: np.random.Generator) -> Image.Image:
    """Compressed far too much."""
    data = io.BytesIO()
    image.save(data, format="JPEG", quality=QUALITY)
    return Image.open(data).convert("RGB")


def small(image: Image.Image, face: Box, _random: np.random.Generator) -> Image.Image:
    """Taken from far away, then cut out: the whole photo shrunk; never enlarged."""
    scale = min(1.0, SMALL / (face[2] - face[0]))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


Degrade = Callable[[Image.Image, Box, np.random.Generator], Image.Image]
STRESSES: Mapping[str, Degrade] = MappingProxyType(
    {"blur": blur, "lowlight": low_light, "occlusion": occlusion, "jpeg": jpeg, "small": small}
)


def degrade(image: Image.Image, stress: str, identity: str, face: Box) -> Image.Image:
    """A reference photo made worse.

    Args:
        image: upright RGB.
        stress: a name of `STRESSES`.
        identity: the person's name: noise and place depend on it and on nothing else.
        face: the person's face in pixels of `image`.
    """
    seed = int.from_bytes(hashlib.sha256(f"{stress}/{identity}".encode()).digest()[:8], "big")
    return STRESSES[stress](image, face, np.random.default_rng(seed))


def parse_stresses(text: str) -> tuple[str, ...]:
    """The names in `blur,jpeg`, each once, in the order of `STRESSES`.

    Raises:
        UsageError: an unknown name.
    """
    names = {part.strip() for part in text.split(",") if part.strip()}
    for name in sorted(names - STRESSES.keys()):
        near = nearest(name, STRESSES)
        raise UsageError(
            f"there is no stress '{name}'",
            f"did you mean '{near}'?" if near else f"they are {', '.join(STRESSES)}",
        )
    return tuple(name for name in STRESSES if name in names)
