"""Find the face that metrics measure in an image."""

from __future__ import annotations

from cachetools import LRUCache, cachedmethod
from PIL import Image

from ...app.stack import load_analyzer
from ...identity.analyzer import Face, FaceAnalyzer
from ...identity.search import SIZES, bgr, find_faces
from ...scorers.cache import CACHE_SIZE, method_key
from .base import Context, Rules

RATIO_SIZE = 320
"""Detector size in pixels of the published face ratio: the published loop over sizes never stops early, so
the last size is used."""


class Faces:
    """Find one face per image and cache it. If an image has several faces, the largest is measured; under the
    published rules, the one that the detector returns first, which has the highest confidence.

    Args:
        analyzer: the models of the recipe's face pack.
        rules: `published` only tries detector sizes from 640 down to 320; `fastface` also tries the image
            with borders, as for the photos of an identity.
    """

    def __init__(self, analyzer: FaceAnalyzer, rules: Rules) -> None:
        self.analyzer = analyzer
        self.rules = rules
        self._faces: LRUCache[bytes, Face | None] = LRUCache(CACHE_SIZE)
        self._ratios: LRUCache[bytes, float] = LRUCache(CACHE_SIZE)

    @cachedmethod(lambda self: self._faces, key=method_key)
    def find(self, image: Image.Image) -> Face | None:
        """Return the face that is measured, or None if no face is found."""
        pixels = bgr(image)
        if self.rules == "published":
            for size in SIZES:
                faces = self.analyzer.detect(pixels, size)
                if faces:
                    return faces[0]
            return None
        faces = find_faces(pixels, self.analyzer)
        return faces[0] if faces else None

    @cachedmethod(lambda self: self._ratios, key=method_key)
    def ratio(self, image: Image.Image) -> float:
        """Return the area of the face box divided by the area of the image; 0 without a face."""
        if self.rules == "published":
            faces = self.analyzer.detect(bgr(image), RATIO_SIZE)
            face = faces[0] if faces else None
        else:
            face = self.find(image)
        if face is None:
            return 0.0
        width, height = face.size
        return width * height / (image.width * image.height)


def faces_of(context: Context) -> Faces:
    """Return the face finder that all metrics of a context share; needs the role `face`."""
    return context.once(
        "faces", lambda: Faces(load_analyzer(context.paths["face"], context.device), context.rules)
    )
