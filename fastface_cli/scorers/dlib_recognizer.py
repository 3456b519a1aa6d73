"""dlib's face recognizer: independent of the models that generate, in code and in training data."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import ModelUnavailableError

SMALLEST = 256
"""Images whose shorter side has fewer pixels are enlarged: the detector finds faces from 80 pixels."""

FACE_IN_CROP = (32, 63, 192, 223)
"""Left, top, right and bottom of the face, brows to chin, in an aligned crop of 224 pixels."""


class DlibRecognizer:
    """dlib's detector, landmarks and descriptors of 128 numbers.

    Raises:
        ModelUnavailableError: the extra `[dlib]` is not installed.
    """

    def __init__(self) -> None:
        try:
            import dlib
        except ImportError as error:
            raise _not_installed() from error
        # Not imported, because it imports setuptools' retired pkg_resources; only its folder is needed.
        package = importlib.util.find_spec("face_recognition_models")
        if package is None or package.origin is None:
            raise _not_installed()
        folder = Path(package.origin).parent / "models"
        self._rectangle: Any = dlib.rectangle
        self._detector = dlib.get_frontal_face_detector()
        self._landmarks = dlib.shape_predictor(str(folder / "shape_predictor_5_face_landmarks.dat"))
        self._network = dlib.face_recognition_model_v1(
            str(folder / "dlib_face_recognition_resnet_model_v1.dat")
        )

    def describe(self, image: Image.Image) -> np.ndarray | None:
        """The descriptor [128] float32 of the largest face that dlib detects; None without a face."""
        scale = max(1.0, SMALLEST / min(image.size))
        if scale > 1:
            size = (round(image.width * scale), round(image.height * scale))
            image = image.resize(size, Image.Resampling.BICUBIC)
        pixels = np.array(image)
        boxes = self._detector(pixels, 0)
        if not boxes:
            return None
        return self._describe(pixels, max(boxes, key=lambda box: box.area())).astype(np.float32)

    def describe_crop(self, crop: np.ndarray) -> np.ndarray:
        """The descriptor [128] float64 of an aligned face crop, [224, 224, 3] uint8 BGR."""
        return self._describe(np.ascontiguousarray(crop[..., ::-1]), self._rectangle(*FACE_IN_CROP))

    def _describe(self, pixels: np.ndarray, box: Any) -> np.ndarray:
        return np.array(self._network.compute_face_descriptor(pixels, self._landmarks(pixels, box)))


def similarities(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """1 minus the Euclidean distance of descriptors, [n, 128] and [m, 128] -> [n, m].

    Two photos of one person are above 0.4.
    """
    from scipy.spatial.distance import cdist

    result: np.ndarray = 1 - cdist(first, second)
    return result


def _not_installed() -> ModelUnavailableError:
    return ModelUnavailableError("dlib is not installed", "pip install 'fastface-cli[dlib]'")
