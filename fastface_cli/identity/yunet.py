"""Face detection by YuNet, without a recognizer: for adapters that read the face crop alone."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from ..errors import ModelUnavailableError
from .analyzer import EMBEDDING, NO_RECOGNIZER, Face

SIDE = 640
"""The model's input. OpenCV 4 accepts other sizes, OpenCV 5 does not."""
THRESHOLD, OVERLAP, MOST = 0.6, 0.3, 5000
"""Score, overlap and count at which OpenCV keeps faces."""


class YuNetAnalyzer:
    """Detects faces with OpenCV. Every face has the same embedding, which means nothing.

    Args:
        file: `face_detection_yunet_2023mar.onnx`.

    Raises:
        ModelUnavailableError: the file does not load.
    """

    recognizer = NO_RECOGNIZER
    note: str | None = None
    """A message for the user, or None."""

    def __init__(self, file: Path) -> None:
        level = cv2.utils.logging.getLogLevel()
        # OpenCV 5 warns about its own default target, and prints what it then raises.
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        try:
            self._detector = cv2.FaceDetectorYN.create(str(file), "", (SIDE, SIDE), THRESHOLD, OVERLAP, MOST)
        except cv2.error as error:
            raise ModelUnavailableError(
                f"the face detector {file} does not load: {str(error).strip().splitlines()[-1]}",
                "download it again with: fastface download",
            ) from error
        finally:
            cv2.utils.logging.setLogLevel(level)

    def detect(self, image: np.ndarray, size: int) -> list[Face]:
        """See `FaceAnalyzer`; the image is scaled to at most 640 pixels."""
        height, width = image.shape[:2]
        scale = min(size, SIDE) / max(height, width)
        small = (max(1, round(width * scale)), max(1, round(height * scale)))
        canvas = np.zeros((SIDE, SIDE, 3), np.uint8)
        canvas[: small[1], : small[0]] = cv2.resize(image, small, interpolation=cv2.INTER_LINEAR)
        _, rows = self._detector.detect(canvas)
        return [
            # The points are named from the person's side: in the image, the left one comes first.
            Face(
                (row[0] / scale, row[1] / scale, (row[0] + row[2]) / scale, (row[1] + row[3]) / scale),
                (row[4:14].reshape(5, 2) / scale).astype(np.float32),
                float(row[14]),
            )
            for row in (rows if rows is not None else ())
            if np.isfinite(row).all()
        ]

    def embed(self, image: np.ndarray, face: Face) -> np.ndarray:
        """Return a constant of unit norm."""
        constant = np.zeros(EMBEDDING, np.float32)
        constant[0] = 1
        return constant

    def raw_embedding(self, image: np.ndarray, face: Face) -> np.ndarray:
        """See `embed`."""
        return self.embed(image, face)
