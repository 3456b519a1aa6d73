"""dlib as the independent recognizer for evaluation; no training stage may import this module."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np


class DlibRecognizer:
    """dlib's face detector, landmarks and 128-d descriptors."""

    def __init__(self) -> None:
        import dlib

        # Only the folder is needed: the package itself imports pkg_resources, which setuptools removed.
        specification = importlib.util.find_spec("face_recognition_models")
        assert specification is not None
        assert specification.origin is not None
        folder = Path(specification.origin).parent / "models"
        self.dlib: Any = dlib
        self.detector = dlib.get_frontal_face_detector()
        self.landmarks = dlib.shape_predictor(str(folder / "shape_predictor_5_face_landmarks.dat"))
        self.network = dlib.face_recognition_model_v1(
            str(folder / "dlib_face_recognition_resnet_model_v1.dat")
        )

    def boxes(self, image: np.ndarray, upsample: int = 0) -> list[np.ndarray]:
        """Return the faces of an RGB image, corners [4] each, ordered by score."""
        rectangles, scores, _ = self.detector.run(np.ascontiguousarray(image), upsample, 0.0)
        order = np.argsort(-np.array(scores))
        corners = [[f.left(), f.top(), f.right(), f.bottom()] for f in rectangles]
        return [np.array(corners[i], np.float32) for i in order]

    def describe(self, image: np.ndarray, box: np.ndarray | None = None) -> np.ndarray | None:
        """Return the descriptor [128] of the best face, or of the one in ``box``; None without a face."""
        scale = max(1.0, 256 / image.shape[0])
        large = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
        boxes = self.boxes(large)
        if boxes:
            corners = boxes[0]
        elif box is not None:
            corners = box * scale
        else:
            return None
        rectangle = self.dlib.rectangle(*(int(v) for v in corners))
        points = self.landmarks(large, rectangle)
        return np.array(self.network.compute_face_descriptor(large, points), np.float32)


def ranks(descriptors: Sequence[np.ndarray | None], references: np.ndarray, own: Sequence[int]) -> np.ndarray:
    """Return the rank (0 is first) of each image's own reference [m, 128]; a missing face ranks last."""
    positions = []
    for descriptor, index in zip(descriptors, own, strict=True):
        if descriptor is None:
            positions.append(len(references))
            continue
        distance = np.linalg.norm(references - descriptor, axis=1)
        positions.append(int((distance < distance[index]).sum()))
    return np.array(positions)
