"""The image of key points that InstantID's ControlNet reads."""

from __future__ import annotations

import math

import cv2
import numpy as np

COLORS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255))
"""RGB of the eyes, the nose and the mouth corners, the left of each pair first."""
NOSE = 2
LIMB, DISC = 4, 10
"""Half width of a limb and radius of a disc, in pixels at every image size, as published."""
DIMMED = 0.6
"""Brightness of the limbs."""


def placed(points: np.ndarray, photo: tuple[float, float], size: tuple[int, int]) -> np.ndarray:
    """Scale key points from a photo into an image: as large as fits, centered.

    Args:
        points: [5, 2] in pixels of the photo.
        photo: width and height of the photo.
        size: width and height of the image.
    """
    scale = min(size[0] / photo[0], size[1] / photo[1])
    border = (np.array(size) - scale * np.array(photo)) / 2
    moved: np.ndarray = points * scale + border
    return moved


def drawn(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Draw key points on black: dimmed limbs from the nose to the others, then a disc on each point.

    Args:
        points: [5, 2] in pixels of the image.
        size: width and height of the image.

    Returns:
        [height, width, 3] uint8, RGB.
    """
    canvas = np.zeros((size[1], size[0], 3), np.float64)
    for index, (end, color) in enumerate(zip(points, COLORS, strict=True)):
        if index == NOSE:
            continue
        start = points[NOSE]
        across, down = (float(side) for side in end - start)
        center = (int((end[0] + start[0]) / 2), int((end[1] + start[1]) / 2))
        axes = (int(math.hypot(across, down) / 2), LIMB)
        angle = int(math.degrees(math.atan2(down, across)))
        cv2.fillConvexPoly(canvas, cv2.ellipse2Poly(center, axes, angle, 0, 360, 1), color)
    image = (canvas * DIMMED).astype(np.uint8)
    for point, color in zip(points, COLORS, strict=True):
        cv2.circle(image, (int(point[0]), int(point[1])), DISC, color, -1)
    return image
