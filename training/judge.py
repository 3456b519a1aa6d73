"""dlib as the independent judge of identity: evaluation only, nothing here may reach a training stage."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np


class Judge:
    """dlib's face detector, landmarks and 128-d descriptors."""

    def __init__(self) -> None:
        import dlib

        # The package of the model files imports setuptools' retired pkg_resources; only its folder is needed.
        specification = importlib.util.find_spec("face_recognition_models")
        assert specification is not None
        assert specification.origin is not None
        folder = Path(specification.origin).parent / "models"
        self.dlib: Any = dlib
        self.find = dlib.get_frontal_face_detector()
        self.shape = dlib.shape_predictor(str(folder / "shape_predictor_5_face_landmarks.dat"))
        self.network = dlib.face_recognition_model_v1(
            str(folder / "dlib_face_recognition_resnet_model_v1.dat")
        )

    def boxes(self, picture: np.ndarray, upsample: int = 0) -> list[np.ndarray]:
        """Faces of an RGB picture, corners [4] each, strongest first."""
        found, scores, _ = self.find.run(np.ascontiguousarray(picture), upsample, 0.0)
        order = np.argsort(-np.array(scores))
        corners = [[f.left(), f.top(), f.right(), f.bottom()] for f in found]
        return [np.array(corners[i], np.float32) for i in order]

    def describe(self, picture: np.ndarray, box: np.ndarray | None = None) -> np.ndarray | None:
        """Descriptor [128] of the strongest face (or of the one in ``box``), None where there is none."""
        scale = max(1.0, 256 / picture.shape[0])
        large = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
        found = self.boxes(large)
        if found:
            corners = found[0]
        elif box is not None:
            corners = box * scale
        else:
            return None
        rectangle = self.dlib.rectangle(*(int(v) for v in corners))
        points = self.shape(large, rectangle)
        return np.array(self.network.compute_face_descriptor(large, points), np.float32)


def ranks(found: Sequence[np.ndarray | None], references: np.ndarray, own: Sequence[int]) -> np.ndarray:
    """Rank (0 is first) of each picture's own reference [m, 128] by distance; a missing face ranks last."""
    places = []
    for descriptor, index in zip(found, own, strict=True):
        if descriptor is None:
            places.append(len(references))
            continue
        distance = np.linalg.norm(references - descriptor, axis=1)
        places.append(int((distance < distance[index]).sum()))
    return np.array(places)
