"""Faces in pictures, for metrics: which face counts, under which rules."""

from __future__ import annotations

from PIL import Image

from ...identity.analyzer import Face, FaceAnalyzer, load_face_models
from ...identity.search import SIZES, bgr, find_faces
from .base import Context, Rules
from .image_cache import Memory, digest

RATIO_SIZE = 320
"""Detector size in pixels at which the published face ratio was measured: its loop over sizes never ends
early, so that the last size counts."""


class Faces:
    """The face of a picture, remembered. Of several, the largest counts; under the published rules the first
    that the detector gives, which is the one it is surest of.

    Args:
        analyzer: the models of the recipe's face pack.
        rules: `published` tries the sizes from 640 down to 320 and nothing else; otherwise pictures are
            tried with borders too, as photos are when an identity is made.
    """

    def __init__(self, analyzer: FaceAnalyzer, rules: Rules) -> None:
        self.analyzer = analyzer
        self.rules = rules
        self._faces: Memory[Face | None] = Memory()
        self._ratios: Memory[float] = Memory()

    def find(self, picture: Image.Image) -> Face | None:
        """The face that counts, None where none is found."""
        return self._faces.once(digest(picture), lambda: self._find(picture))

    def ratio(self, picture: Image.Image) -> float:
        """Area of the face's box over the picture's; 0 without a face."""
        return self._ratios.once(digest(picture), lambda: self._ratio(picture))

    def _find(self, picture: Image.Image) -> Face | None:
        pixels = bgr(picture)
        if self.rules == "published":
            for size in SIZES:
                faces = self.analyzer.detect(pixels, size)
                if faces:
                    return faces[0]
            return None
        faces = find_faces(pixels, self.analyzer)
        return faces[0] if faces else None

    def _ratio(self, picture: Image.Image) -> float:
        if self.rules == "published":
            faces = self.analyzer.detect(bgr(picture), RATIO_SIZE)
            face = faces[0] if faces else None
        else:
            face = self.find(picture)
        if face is None:
            return 0.0
        width, height = face.size
        return width * height / (picture.width * picture.height)


def faces_of(context: Context) -> Faces:
    """The faces that all metrics of a context share; needs the role `face`."""
    return context.once(
        "faces", lambda: Faces(load_face_models(context.paths["face"], device=context.device), context.rules)
    )
