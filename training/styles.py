"""Visual styles as operations on images uint8 RGB [h, w, 3].

Every style has several descriptions; a caption is ``description; subject``, as in the published prompts.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

ImageArray = np.ndarray


def _gray(image: ImageArray) -> ImageArray:
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))


def pencil(image: ImageArray) -> ImageArray:
    """Draw lines at edges: color dodge of the gray image with its blurred negative."""
    gray = _gray(image)
    blurred = cv2.GaussianBlur(255 - gray, (0, 0), image.shape[0] / 24)
    dodge = np.minimum(gray.astype(np.float32) * 255 / np.maximum(255.0 - blurred, 1), 255)
    sample = np.clip(0.72 * dodge + 0.28 * gray, 0, 255).astype(np.uint8)
    return np.repeat(sample[..., None], 3, axis=2)


def watercolour(image: ImageArray) -> ImageArray:
    """Draw flat washes on paper: repeated edge-preserving smoothing, paler and more saturated."""
    washed = image
    for _ in range(3):
        washed = cv2.bilateralFilter(washed, 7, 45, 5)
    hsv = cv2.cvtColor(washed, cv2.COLOR_RGB2HSV).astype(np.float32)
    hsv[..., 1] = np.minimum(hsv[..., 1] * 1.15, 255)
    hsv[..., 2] = 255 * (hsv[..., 2] / 255) ** 0.7
    colored = cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2RGB).astype(np.float32)
    height, width = image.shape[:2]
    y, x = np.mgrid[0:height, 0:width]
    radius = np.hypot((x / width - 0.5) / 0.62, (y / height - 0.5) / 0.66)
    paper = np.clip((radius - 0.72) * 4, 0, 1)[..., None]
    return np.asarray(colored * (1 - paper) + 250 * paper).astype(np.uint8)


def comic(image: ImageArray) -> ImageArray:
    """Draw few flat colors and black contours."""
    smooth = cv2.bilateralFilter(image, 7, 60, 5)
    hsv = cv2.cvtColor(smooth, cv2.COLOR_RGB2HSV).astype(np.float32)
    hsv[..., 1] = np.minimum(hsv[..., 1] * 1.25, 255)
    hsv[..., 2] = np.minimum(hsv[..., 2] // 36 * 42 + 8, 255)
    flat = cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2RGB).astype(np.float32)
    gray = _gray(smooth).astype(np.float32)
    lines = cv2.GaussianBlur(gray, (0, 0), 2.4) - cv2.GaussianBlur(gray, (0, 0), 1.0)
    ink = np.clip((lines - 5) / 6, 0, 1)[..., None]
    return np.asarray(np.clip(flat * (1 - ink), 0, 255), np.uint8)


def black_and_white(image: ImageArray) -> ImageArray:
    """Convert to gray with increased contrast."""
    gray = _gray(image).astype(np.float32) / 255
    curve = np.clip((gray - 0.5) * 1.35 + 0.5, 0, 1) * 255
    return np.repeat(curve.astype(np.uint8)[..., None], 3, axis=2)


def pixel_art(image: ImageArray) -> ImageArray:
    """Draw blocks of 1/32 of the side in few colors."""
    small = cv2.resize(image, (32, 32), interpolation=cv2.INTER_AREA)
    flat = np.minimum(small.astype(np.int32) // 32 * 32 + 16, 255).astype(np.uint8)
    size = (image.shape[1], image.shape[0])
    return np.asarray(cv2.resize(flat, size, interpolation=cv2.INTER_NEAREST))


def neon(image: ImageArray) -> ImageArray:
    """Darken to violet, with glowing edges: magenta at the left, cyan at the right."""
    gray = cv2.GaussianBlur(_gray(image), (0, 0), 1.0).astype(np.float32) / 255
    slope = cv2.Sobel(gray, cv2.CV_32F, 1, 0) + 0.6 * cv2.Sobel(gray, cv2.CV_32F, 0, 1)
    light = np.clip(np.stack([slope, -slope], -1) * 1.8, 0, 1)
    glow = np.clip(light + cv2.GaussianBlur(light, (0, 0), 2.5), 0, 1)
    night = gray[..., None] * np.array([105.0, 55.0, 150.0])
    lit = glow[..., :1] * np.array([255.0, 40.0, 200.0]) + glow[..., 1:] * np.array([20.0, 230.0, 255.0])
    return np.asarray(np.clip(night + lit, 0, 255), np.uint8)


def sepia(image: ImageArray) -> ImageArray:
    """Tint brown with dark corners, as an old photo."""
    gray = _gray(image).astype(np.float32)[..., None] / 255
    toned = (0.15 + 0.85 * gray) * np.array([240.0, 205.0, 160.0])
    height, width = image.shape[:2]
    y, x = np.mgrid[0:height, 0:width]
    radius = np.hypot(x / width - 0.5, y / height - 0.5)
    return np.asarray(toned * np.clip(1.35 - 1.1 * radius, 0, 1)[..., None]).astype(np.uint8)


STYLES: dict[str, tuple[Callable[[ImageArray], ImageArray], tuple[str, ...]]] = {
    "pencil": (
        pencil,
        ("pencil drawing", "a pencil sketch", "graphite drawing on paper", "hand-drawn sketch"),
    ),
    "watercolour": (
        watercolour,
        (
            "watercolour painting",
            "watercolour",
            "a soft watercolour on paper",
            "watercolour painting, pale washes",
        ),
    ),
    "comic": (
        comic,
        ("comic book style", "a comic", "comic illustration, ink outlines", "flat cartoon colors"),
    ),
    "black_and_white": (
        black_and_white,
        (
            "black and white photograph",
            "monochrome photo",
            "black and white",
            "high contrast black and white film",
        ),
    ),
    "pixel_art": (pixel_art, ("pixel art", "8-bit pixel art", "retro video game sprite", "pixel art style")),
    "neon": (neon, ("neon lights", "neon cyberpunk", "cyberpunk neon glow", "neon style, purple night")),
    "sepia": (
        sepia,
        ("sepia photograph", "old sepia photo", "vintage photograph", "an antique brown photograph"),
    ),
}
"""Name -> (operation, descriptions)."""

PHOTO: tuple[str, ...] = ("photo", "a color photograph", "realistic photo", "studio photograph")
"""Descriptions of the unchanged image, used in some of the captions."""
