"""Portraits, labels, held-out split, aligned crops and styled copies, cached as arrays in ``--work``."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from training.common import Options, options
from training.styles import STYLES

HELD_OUT = 200
"""Number of portraits that no stage trains on: the first 200 with an index divisible by 18."""

STYLE_NAMES = ("photo", *STYLES)
"""Order of the second axis of ``Portraits.pictures``."""

ALIGNED = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]],
    np.float32,
)
"""Positions of the five key points in a 112x112 aligned crop (convention of InsightFace)."""


def is_held_out(index: int) -> bool:
    """Return whether a portrait is used only for evaluation."""
    return index % 18 == 0 and index // 18 < HELD_OUT


def alignment(key_points: np.ndarray, side: int = 112) -> np.ndarray:
    """Return the 2x3 similarity transform, in pixels, that aligns five key points [5, 2].

    Least squares in closed form (Umeyama without reflection), as in ``insightface.utils.face_align``.
    """
    target = ALIGNED * (side / 112)
    source_mean, target_mean = key_points.mean(0), target.mean(0)
    source, centered = key_points - source_mean, target - target_mean
    power = float((source**2).sum())
    a = float((source * centered).sum()) / power
    b = float((source[:, 0] * centered[:, 1] - source[:, 1] * centered[:, 0]).sum()) / power
    linear = np.array([[a, -b], [b, a]])
    return np.concatenate([linear, (target_mean - linear @ source_mean)[:, None]], axis=1)


def crop(image: np.ndarray, key_points: np.ndarray, side: int = 112) -> np.ndarray:
    """Return the aligned crop [side, side, 3] of an image; pixels outside of the image are black."""
    return np.asarray(cv2.warpAffine(image, alignment(key_points, side), (side, side), borderValue=0.0))


def mirrored(places: np.ndarray, width: int) -> np.ndarray:
    """Return the positions of points [n, 2], in pixels, in the mirrored image, in the same order."""
    return np.asarray(places * (-1, 1) + (width - 1, 0))


def mirrored_points(key_points: np.ndarray, width: int) -> np.ndarray:
    """Return the key points of a face [5, 2] in the mirrored image, with left and right swapped."""
    return mirrored(key_points, width)[[1, 0, 2, 4, 3]]


@dataclass(frozen=True)
class Portraits:
    """The data set, at one image size."""

    work: Path
    folder: Path
    size: int

    @cached_property
    def labels(self) -> list[dict[str, Any]]:
        """One dictionary per portrait, as in ``labels.jsonl``."""
        return [json.loads(line) for line in (self.folder / "labels.jsonl").read_text().splitlines()]

    @cached_property
    def embeddings(self) -> np.ndarray:
        """Embeddings of the teacher, [n, 192] float32, unit norm."""
        values = np.load(self.folder / "embeddings.npy").astype(np.float32)
        return np.asarray(values / np.linalg.norm(values, axis=1, keepdims=True))

    @cached_property
    def key_points(self) -> np.ndarray:
        """Five key points per portrait, [n, 5, 2], in pixels of the 256x256 original."""
        return np.array([label["key_points"] for label in self.labels], np.float32)

    @cached_property
    def train(self) -> np.ndarray:
        """Indices of the training portraits."""
        return np.array([i for i in range(len(self.labels)) if not is_held_out(i)])

    @cached_property
    def held_out(self) -> np.ndarray:
        """Indices of the 200 portraits for evaluation."""
        return np.array([i for i in range(len(self.labels)) if is_held_out(i)])

    @cached_property
    def originals(self) -> np.ndarray:
        """All portraits, uint8 RGB [n, 256, 256, 3], memory-mapped."""
        path = self.work / "originals.npy"
        if not path.exists():
            with zipfile.ZipFile(self.folder / "portraits.zip") as archive:
                images = [Image.open(io.BytesIO(archive.read(label["file"]))) for label in self.labels]
                _save(path, np.stack([np.asarray(image.convert("RGB")) for image in images]))
        return np.asarray(np.load(path, mmap_mode="r"))

    @cached_property
    def images(self) -> np.ndarray:
        """Every portrait in every style, uint8 RGB [n, styles, size, size, 3]; style 0 is the photo."""
        path = self.work / f"pictures{self.size}.npy"
        if not path.exists():
            shape = (len(self.labels), len(STYLE_NAMES), self.size, self.size, 3)
            styled = np.lib.format.open_memmap(path.with_suffix(".partial"), "w+", np.uint8, shape)
            for index, original in enumerate(self.originals):
                photo = cv2.resize(original, (self.size, self.size), interpolation=cv2.INTER_AREA)
                styled[index, 0] = photo
                for place, (operation, _) in enumerate(STYLES.values(), start=1):
                    styled[index, place] = operation(photo)
            styled.flush()
            path.with_suffix(".partial").rename(path)
        return np.asarray(np.load(path, mmap_mode="r"))

    @cached_property
    def crops(self) -> np.ndarray:
        """Aligned crops of the photos, uint8 RGB [n, 112, 112, 3]."""
        path = self.work / "crops.npy"
        if not path.exists():
            pairs = zip(self.originals, self.key_points, strict=True)
            _save(path, np.stack([crop(original, points) for original, points in pairs]))
        return np.asarray(np.load(path, mmap_mode="r"))


def _save(path: Path, values: np.ndarray) -> None:
    """Write an array atomically."""
    temporary = path.with_suffix(".partial")
    with temporary.open("wb") as file:
        np.save(file, values)
    temporary.replace(path)


def load(settings: Options) -> Portraits:
    """Return the data set for these options."""
    return Portraits(settings.work, settings.portraits, settings.size)


def main() -> None:
    """Write the caches."""
    portraits = load(options("data", 0))
    print("originals", portraits.originals.shape, "crops", portraits.crops.shape)
    print("pictures", portraits.images.shape, STYLE_NAMES, "held out", len(portraits.held_out))


if __name__ == "__main__":
    main()
