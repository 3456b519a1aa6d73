"""Finding the face that is meant: retries around the detector, and the choice among several faces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from PIL import Image

from ..errors import NoFaceError, UsageError
from .analyzer import Box, Face, FaceAnalyzer
from .photos import Photo

SIZES = (640, 576, 512, 448, 384, 320)
"""Detector sizes in pixels, in the order tried: a face that fills the picture is found at a smaller one."""
LARGE_SIZE = 1280
"""Tried last on larger pictures, where faces may be small."""
BORDERS = (0.0, 0.25, 0.5, 1.0)
"""Black borders around the picture, as shares of its longest side: tight crops lack the context that a
detector has learnt from. Black, because alignment fills with black beyond the picture's edge too."""
STRIP = 64
"""Pictures longer than this many times their width are only tried with a border: scaled to the detector's
size, nothing would be left of the short side."""


def find_faces(picture: np.ndarray, analyzer: FaceAnalyzer) -> list[Face]:
    """The faces of a picture, largest first, from the first attempt that sees any; empty when none does.

    Args:
        picture: [height, width, 3] uint8, BGR.
    """
    for border, size in _attempts(picture):
        faces = _detect(picture, analyzer, border, size)
        if faces:
            return sorted(faces, key=lambda face: (-_area(face.box), face.box))
    return []


def describe_attempts(picture: np.ndarray) -> str:
    """What `find_faces` tries on a picture in vain, for the message."""
    attempts = list(_attempts(picture))
    sizes = list(dict.fromkeys(size for _, size in attempts))
    borders = list(dict.fromkeys(border for border, _ in attempts if border))
    return (
        f"tried detector sizes {_listed([str(size) for size in sizes])}, "
        f"and padding of {_listed([f'{border:.0%}' for border in borders])} around the picture"
    )


def choose_face(
    photo: Photo,
    faces: list[Face],
    analyzer: FaceAnalyzer,
    *,
    index: int | None = None,
    box: Box | None = None,
) -> Face:
    """The face asked for: the one in `box`, number `index`, or the largest.

    Args:
        faces: what `find_faces` returned for the photo; not empty unless `box` is given.
        index: 0 is the largest.
        box: in pixels of the upright original. A rough frame is enough; where none of the faces lies in
            it, that part of the photo is looked at by itself.

    Returns:
        The face in pixels of `photo.image`.

    Raises:
        NoFaceError: there is no such face.
    """
    if box is not None:
        frame = scaled(box, photo.scale)
        found = _in_box(faces, frame) or _in_box(_look_closer(bgr(photo.image), analyzer, frame), frame)
        if found is None:
            raise NoFaceError(f"no face in the box {rounded(box)} of {photo.name}", _where(faces, photo))
        return found
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
    """The box in a picture whose pixels are `scale` times as many along a side."""
    return (box[0] * scale, box[1] * scale, box[2] * scale, box[3] * scale)


def rounded(box: Box) -> tuple[int, ...]:
    """The box in whole pixels, for messages."""
    return tuple(round(side) for side in box)


def check_choice(index: int | None, box: Box | None) -> None:
    """Refuse choices that can never be met.

    Raises:
        UsageError: both given, a negative index, or a box that is none.
    """
    if index is not None and box is not None:
        raise UsageError("a face is chosen by its index or by a box, not both", "leave one of them out")
    if index is not None and index < 0:
        raise UsageError(f"a face index counts from 0, not {index}", "0 is the largest face")
    if box is not None and not (np.isfinite(box).all() and box[0] < box[2] and box[1] < box[3]):
        raise UsageError(
            f"({', '.join(f'{side:g}' for side in box)}) is not a face box",
            "give left, top, right, bottom in pixels of the upright photo",
        )


def _attempts(picture: np.ndarray) -> Iterator[tuple[float, int]]:
    """(border, detector size), in the order tried. The detector scales every picture, tiny ones too, to its
    size, so there is no need to enlarge any."""
    short, long = sorted(picture.shape[:2])
    for border in BORDERS:
        if border == 0.0 and long > STRIP * short:
            continue
        yield from ((border, size) for size in SIZES)
        if border == 0.0 and long > LARGE_SIZE:
            yield border, LARGE_SIZE


def _detect(picture: np.ndarray, analyzer: FaceAnalyzer, border: float, size: int) -> list[Face]:
    """The usable faces seen in one attempt, in pixels of `picture`."""
    height, width = picture.shape[:2]
    if border == 0.0:
        faces = analyzer.detect(picture, size)
    else:
        # The detector sees at most `size` pixels: a border around all of a large picture wastes memory.
        scale = min(1.0, LARGE_SIZE / max(height, width))
        small = picture
        if scale < 1.0:
            shape = (max(1, round(width * scale)), max(1, round(height * scale)))
            small = np.asarray(Image.fromarray(picture).resize(shape, Image.Resampling.BILINEAR))
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


def _look_closer(picture: np.ndarray, analyzer: FaceAnalyzer, box: Box) -> list[Face]:
    """The faces seen in the box and as much again on each side, in pixels of `picture`."""
    height, width = picture.shape[:2]
    across, down = box[2] - box[0], box[3] - box[1]
    wide = (box[0] - across, box[1] - down, box[2] + across, box[3] + down)
    left, top, right, bottom = (
        round(side) for side in _overlap(wide, (0.0, 0.0, float(width), float(height)))
    )
    if right <= left or bottom <= top:
        return []
    part = np.ascontiguousarray(picture[top:bottom, left:right])
    return [face.moved(left, top) for face in find_faces(part, analyzer)]


def _in_box(faces: list[Face], box: Box) -> Face | None:
    """The face that meets the box best, among those that lie mostly in it or hold most of it."""

    def union_share(face: Face) -> float:
        common = _area(_overlap(face.box, box))
        return common / (_area(face.box) + _area(box) - common)

    def belongs(face: Face) -> bool:
        return _area(_overlap(face.box, box)) >= 0.5 * min(_area(face.box), _area(box))

    return max(filter(belongs, faces), key=union_share, default=None)


def _overlap(one: Box, other: Box) -> Box:
    return (max(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), min(one[3], other[3]))


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _where(faces: list[Face], photo: Photo) -> str:
    if not faces:
        return "no other face was found either"
    boxes = [rounded(scaled(face.box, 1 / photo.scale)) for face in faces[:8]]
    return "faces found: " + "; ".join(f"{index} at {box}" for index, box in enumerate(boxes))


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
