"""The face that PuLID sees: aligned to 512 pixels, in gray, with everything but face and hair in white.

Source: ToTheBeginning/PuLID, and the alignment of facexlib. The parser is a BiSeNet with 19 classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ModelUnavailableError, NoFaceError

if TYPE_CHECKING:
    from .eva import FaceEncoder

SIDE = 512
TEMPLATE = np.array(
    [
        [192.98138, 239.94708],
        [318.90277, 240.1936],
        [256.63416, 314.01935],
        [201.26117, 371.41043],
        [313.08905, 371.15118],
    ],
    np.float32,
)
"""Where the key points are in an aligned face of 512 pixels: eyes, nose, corners of the mouth."""
BORDER = (135, 133, 132)
"""Color outside the photo, BGR."""
CLASSES = 19
REMOVED = (0, 7, 8, 9, 14, 15, 16, 18)
"""Classes that become white: background, ears, ear rings, neck, necklace, cloth, hat."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the parser's images, RGB in [0, 1]."""
GRAY = (0.299, 0.587, 0.114)


def aligned(image: np.ndarray, key_points: np.ndarray) -> np.ndarray:
    """The face of a photo at the template.

    Args:
        image: [height, width, 3] uint8, BGR.
        key_points: [5, 2] in its pixels.

    Returns:
        [512, 512, 3] uint8, BGR.

    Raises:
        NoFaceError: the key points do not define a face.
    """
    import cv2

    matrix, _ = cv2.estimateAffinePartial2D(key_points.astype(np.float32), TEMPLATE, method=cv2.LMEDS)
    if matrix is None or not np.isfinite(matrix).all():
        raise NoFaceError("the key points of the face lie on one line", "use another photo")
    face: np.ndarray = cv2.warpAffine(
        image, matrix, (SIDE, SIDE), borderMode=cv2.BORDER_CONSTANT, borderValue=BORDER
    )
    return face


def gray_face(face: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Gray where the face and hair are, white elsewhere.

    Args:
        face: [height, width, 3] uint8, BGR.
        classes: [height, width], of the parser.

    Returns:
        [height, width, 3] float32, RGB in [0, 1].
    """
    rgb = face[:, :, ::-1].astype(np.float32) / 255
    gray = np.repeat((rgb @ np.array(GRAY, np.float32))[:, :, None], 3, axis=2)
    result: np.ndarray = np.where(np.isin(classes, REMOVED)[:, :, None], np.float32(1), gray)
    return result


class FaceParser:
    """A face parser as ONNX file.

    Args:
        path: of the file.

    Raises:
        ModelUnavailableError: it does not load.
    """

    def __init__(self, path: Path) -> None:
        try:
            import onnxruntime

            self._session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises many kinds of errors
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelUnavailableError(
                f"the face parser {path} does not load: {reason}", "download it again: fastface download"
            ) from error

    def classes(self, face: np.ndarray) -> np.ndarray:
        """The class of each pixel of an aligned face.

        Args:
            face: [512, 512, 3] uint8, BGR.

        Returns:
            [512, 512] int64, 0 to 18.

        Raises:
            ModelUnavailableError: the file is not a face parser.
        """
        rgb = face[:, :, ::-1].astype(np.float32) / 255
        normalized = (rgb - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
        inputs = {self._session.get_inputs()[0].name: normalized.transpose(2, 0, 1)[None]}
        scores = self._session.run(None, inputs)[0]
        if scores.shape != (1, CLASSES, SIDE, SIDE):
            raise ModelUnavailableError(
                f"the face parser gives {list(scores.shape)}, not {[1, CLASSES, SIDE, SIDE]}",
                "use face-parsing-resnet18",
            )
        classes: np.ndarray = scores[0].argmax(axis=0)
        return classes


class GrayFaceEncoder:
    """From a face in a photo to the features that PuLID reads.

    Args:
        parser: finds what is face and hair.
        tower: encodes the gray face.
    """

    def __init__(self, parser: FaceParser, tower: FaceEncoder) -> None:
        self._parser = parser
        self._tower = tower

    def features(self, image: np.ndarray, key_points: np.ndarray) -> dict[str, np.ndarray]:
        """`eva_embedding` and `eva_hidden` of a face.

        Args:
            image: [height, width, 3] uint8, BGR.
            key_points: [5, 2] in its pixels.

        Raises:
            NoFaceError: the key points do not define a face.
        """
        face = aligned(image, key_points)
        embedding, hidden = self._tower.encode(gray_face(face, self._parser.classes(face)))
        return {"eva_embedding": embedding, "eva_hidden": hidden}
