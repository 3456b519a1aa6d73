"""Find the requested face: retries of the detector, and the choice among several faces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from PIL import Image

from ..errors import NoFaceError, UsageError
from .analyzer import Box, Face, FaceAnalyzer
from .photos import Photo

SIZES = (640, 576, 512, 448, 384, 320)
"""Detector sizes in pixels, in the order tried: a smaller size detects a face that fills the image."""
LARGE_SIZE = 1280
"""Tried last for larger images, in which faces may be small."""
BORDERS = (0.0, 0.25, 0.5, 1.0)
"""Black borders around the image, as shares of its longest side: tight crops lack the context that
the detector was trained with. Black, because alignment also fills the area outside the image with black."""
CERTAIN = 0.9
"""A detector score that only upright faces reach."""
CLEARLY = 0.1
"""How much higher the score must be in a rotated image: with the pocket, 40 of 40
portraits differ by more."""
STRIP = 64
"""Images longer than this many times their width are only tried with a border: scaled to the detector's
size, the short side would vanish."""


def find_faces(image: np.ndarray, analyzer: FaceAnalyzer) -> list[Face]:
    """Return the faces of an image, largest first, from the first attempt that detects any, or [].

    Args:
        image: [height, width, 3] uint8, BGR.
    """
    for border, size in _attempts(image):
        faces = _detect(image, analyzer, border, size)
        if faces:
            return sorted(faces, key=lambda face: (-_area(face.box), face.box))
    return []


def find_upright(image: Image.Image, analyzer: FaceAnalyzer) -> tuple[Image.Image, list[Face], int]:
    """Rotate an image that lies on its side.

    Returns:
        The image, what `find_faces` returns for it, and the number of quarter turns to the left.
    """
    pixels = bgr(image)
    faces = find_faces(pixels, analyzer)
    turns = _turns_upright(pixels, faces, analyzer)
    if turns:
        image = image.rotate(90 * turns, expand=True)
        faces = find_faces(bgr(image), analyzer)
    return image, faces, turns


def _turns_upright(image: np.ndarray, faces: list[Face], analyzer: FaceAnalyzer) -> int:
    """How many quarter turns to the left make the faces of an image upright, 0 to 3.

    Some programs lose the EXIF orientation of a photo. Detectors find rotated faces too, but with a lower
    score, and their key points may be wrong.

    Args:
        image: [height, width, 3] uint8, BGR.
        faces: what `find_faces` returned for the image.
    """
    scores = [max((face.score for face in faces), default=0.0)]
    if scores[0] >= CERTAIN or max(image.shape[:2]) > STRIP * min(image.shape[:2]):
        return 0
    sizes = (SIZES[0], SIZES[-1])
    for turns in (1, 2, 3):
        turned = np.ascontiguousarray(np.rot90(image, turns))
        scores.append(
            max((face.score for size in sizes for face in _detect(turned, analyzer, 0.0, size)), default=0.0)
        )
    best = int(np.argmax(scores))
    return best if scores[best] > scores[0] + CLEARLY else 0


def describe_attempts(image: np.ndarray) -> str:
    """Describe what `find_faces` tried, for the error message."""
    attempts = list(_attempts(image))
    sizes = list(dict.fromkeys(size for _, size in attempts))
    borders = list(dict.fromkeys(border for border, _ in attempts if border))
    return (
        f"tried detector sizes {_listed([str(size) for size in sizes])}, "
        f"and padding of {_listed([f'{border:.0%}' for border in borders])} around the image"
    )


def choose_face(
    photo: Photo,
    faces: list[Face],
    analyzer: FaceAnalyzer,
    *,
    index: int | None = None,
    box: Box | None = None,
) -> Face:
    """Return the requested face: the face in `box`, face number `index`, or the largest.

    Args:
        faces: what `find_faces` returned for the photo; not empty unless `box` is given.
        index: 0 is the largest.
        box: in pixels of the upright original. A rough box is enough. If it contains none of the faces,
            that part of the photo is searched separately.

    Returns:
        The face in pixels of `photo.image`.

    Raises:
        NoFaceError: the requested face does not exist.
    """
    if box is not None:
        frame = scaled(box, photo.scale)
        face = _in_box(faces, frame) or _in_box(_look_closer(bgr(photo.image), analyzer, frame), frame)
        if face is None:
            raise NoFaceError(f"no face in the box {rounded(box)} of {photo.name}", _where(faces, photo))
        return face
    if index is not None and index >= len(faces):
        count = "1 face" if len(faces) == 1 else f"{len(faces)} faces"
        raise NoFaceError(
            f"{photo.name} has no face number {index}: {count} found",
            f"faces are numbered from 0, the largest first; {_where(faces, photo)}",
        )
    return faces[index or 0]


def bgr(image: Image.Image) -> np.ndarray:
    """An RGB image as [height, width, 3] uint8 in BGR order."""
    return np.ascontiguousarray(np.asarray(image)[:, :, ::-1])


def scaled(box: Box, scale: float) -> Box:
    """The box in the image scaled by `scale`."""
    return (box[0] * scale, box[1] * scale, box[2] * scale, box[3] * scale)


def rounded(box: Box) -> tuple[int, ...]:
    """The box in whole pixels, for messages."""
    return tuple(round(side) for side in box)


def check_choice(index: int | None, box: Box | None) -> None:
    """Refuse invalid choices of a face.

    Raises:
        UsageError: both are given, the index is negative, or the box is invalid.
    """
    if index is not None and box is not None:
        raise UsageError("choose a face by index or by box, not both", "remove one of the options")
    if index is not None and index < 0:
        raise UsageError(f"a face index counts from 0, not {index}", "0 is the largest face")
    if box is not None and not (np.isfinite(box).all() and box[0] < box[2] and box[1] < box[3]):
        raise UsageError(
            f"({', '.join(f'{side:g}' for side in box)}) is not a face box",
            "give left, top, right, bottom in pixels of the upright photo",
        )


def _attempts(image: np.ndarray) -> Iterator[tuple[float, int]]:
    """(border, detector size), in the order tried. The detector scales every image to its size, so small
    images need no enlarging."""
    short, long = sorted(image.shape[:2])
    for border in BORDERS:
        if border == 0.0 and long > STRIP * short:
            continue
        yield from ((border, size) for size in SIZES)
        if border == 0.0 and long > LARGE_SIZE:
            yield border, LARGE_SIZE


def _detect(image: np.ndarray, analyzer: FaceAnalyzer, border: float, size: int) -> list[Face]:
    """The usable faces of one attempt, in pixels of `image`."""
    height, width = image.shape[:2]
    if border == 0.0:
        faces = analyzer.detect(image, size)
    else:
        # The detector uses at most `size` pixels: a border around a large image at full size wastes memory.
        scale = min(1.0, LARGE_SIZE / max(height, width))
        small = image
        if scale < 1.0:
            shape = (max(1, round(width * scale)), max(1, round(height * scale)))
            small = np.asarray(Image.fromarray(image).resize(shape, Image.Resampling.BILINEAR))
        pad = round(border * max(small.shape[:2]))
        padded = np.pad(small, ((pad, pad), (pad, pad), (0, 0)))
        faces = [face.moved(-pad, -pad, 1 / scale) for face in analyzer.detect(padded, size)]
    frame = (0.0, 0.0, float(width), float(height))
    usable = []
    for face in faces:
        left, top, right, bottom = face.box
        inside = 0 <= (left + right) / 2 <= width and 0 <= (top + bottom) / 2 <= height
        if inside and _area(_overlap(face.box, frame)) > 0:
            usable.append(replace(face, box=_overlap(face.box, frame)))
    return usable


def _look_closer(image: np.ndarray, analyzer: FaceAnalyzer, box: Box) -> list[Face]:
    """The faces in the box and one box size around it, in pixels of `image`."""
    height, width = image.shape[:2]
    across, down = box[2] - box[0], box[3] - box[1]
    wide = (box[0] - across, box[1] - down, box[2] + across, box[3] + down)
    left, top, right, bottom = (
        round(side) for side in _overlap(wide, (0.0, 0.0, float(width), float(height)))
    )
    if right <= left or bottom <= top:
        return []
    part = np.ascontiguousarray(image[top:bottom, left:right])
    return [face.moved(left, top) for face in find_faces(part, analyzer)]


def _in_box(faces: list[Face], box: Box) -> Face | None:
    """The face that fits the box best, among those at least half inside it or covering half of it."""

    def union_share(face: Face) -> float:
        common = _area(_overlap(face.box, box))
        return common / (_area(face.box) + _area(box) - common)

    def belongs(face: Face) -> bool:
        return _area(_overlap(face.box, box)) >= 0.5 * min(_area(face.box), _area(box))

    return max(filter(belongs, faces), key=union_share, default=None)


def _overlap(first: Box, second: Box) -> Box:
    return (
        max(first[0], second[0]),
        max(first[1], second[1]),
        min(first[2], second[2]),
        min(first[3], second[3]),
    )


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _where(faces: list[Face], photo: Photo) -> str:
    if not faces:
        return "no other face was found either"
    boxes = [rounded(scaled(face.box, 1 / photo.scale)) for face in faces[:8]]
    return "faces found: " + "; ".join(f"{index} at {box}" for index, box in enumerate(boxes))


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
