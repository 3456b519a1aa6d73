"""Faces and the models that see them: the one edge to InsightFace."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np

from ..errors import ModelUnavailableError

Box: TypeAlias = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels, as in Pillow and InsightFace."""

EMBEDDING = 512
"""Numbers in an embedding; the adapter was trained on these."""
CROP = 224
"""Side of an aligned crop in pixels."""


@dataclass(frozen=True)
class Face:
    """A face in a picture; coordinates are pixels of that picture."""

    box: Box
    key_points: np.ndarray
    """[5, 2] float32: eyes, tip of the nose, corners of the mouth; left one first."""
    score: float
    """The detector's certainty, 0 to 1."""

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in pixels."""
        left, top, right, bottom = self.box
        return right - left, bottom - top

    def moved(self, dx: float, dy: float, scale: float = 1.0) -> Face:
        """The same face in a picture whose pixels are `scale` times ours, shifted by (dx, dy) before."""
        left, top, right, bottom = self.box
        box = ((left + dx) * scale, (top + dy) * scale, (right + dx) * scale, (bottom + dy) * scale)
        points = ((self.key_points + np.array([dx, dy])) * scale).astype(np.float32)
        return replace(self, box=box, key_points=points)


class FaceAnalyzer(Protocol):
    """What is asked of the face models. Pictures are [height, width, 3] uint8 in BGR order."""

    def detect(self, picture: np.ndarray, size: int) -> list[Face]:
        """The faces seen when the picture is scaled to fit into a square of `size` pixels, in any order."""
        ...

    def embed(self, picture: np.ndarray, face: Face) -> np.ndarray:
        """The unit-norm embedding of one face, [512] float32."""
        ...


class InsightFaceAnalyzer:
    """Detection and recognition of an InsightFace pack."""

    def __init__(self, app: Any, folder: Path, *, wants_cuda: bool) -> None:
        self._detector = app.models["detection"]
        self._recognizer = app.models["recognition"]
        self._folder = folder
        self.provider: str = self._recognizer.session.get_providers()[0]
        """The ONNX Runtime provider that the recognizer's session really has."""
        self.note: str | None = None
        """What the user should know, or None."""
        if wants_cuda and self.provider != "CUDAExecutionProvider":
            self.note = (
                "the face models run on the CPU because this ONNX Runtime has no working CUDA; "
                "`fastface doctor --fix` puts onnxruntime-gpu in its place"
            )

    def detect(self, picture: np.ndarray, size: int) -> list[Face]:
        """See `FaceAnalyzer`."""
        boxes, points = self._detector.detect(picture, input_size=(size, size))
        if points is None:
            raise ModelUnavailableError(
                f"the face detector in {self._folder} finds no key points",
                "use a pack with key points, such as buffalo_l",
            )
        return [
            Face((float(row[0]), float(row[1]), float(row[2]), float(row[3])), five, float(row[4]))
            for row, five in zip(boxes, points, strict=True)
            if np.isfinite(row).all() and np.isfinite(five).all()
        ]

    def embed(self, picture: np.ndarray, face: Face) -> np.ndarray:
        """See `FaceAnalyzer`."""
        from insightface.app.common import Face as Measured

        measured = Measured(kps=face.key_points)
        with _quietly():
            self._recognizer.get(picture, measured)
            found = np.asarray(measured.normed_embedding, dtype=np.float32)
        if found.shape != (EMBEDDING,):
            raise ModelUnavailableError(
                f"the face recognizer in {self._folder} gives {found.size} numbers a face; "
                f"the adapter needs {EMBEDDING}",
                "use the pack that the adapter was trained with: buffalo_l",
            )
        return found


def load_face_models(pack_folder: Path, *, device: str = "cpu") -> InsightFaceAnalyzer:
    """The detector and the recognizer of a pack, from its folder alone: nothing is downloaded.

    Args:
        pack_folder: folder with the pack's .onnx files.
        device: `cuda` or `cuda:N` runs them there if ONNX Runtime can; anything else on the CPU.

    Raises:
        ModelUnavailableError: the folder does not hold a pack that loads.
    """
    again = "fetch it again with: fastface download"
    if not any(pack_folder.glob("*.onnx")):
        raise ModelUnavailableError(f"there are no .onnx files in the face pack folder {pack_folder}", again)
    try:
        with _quietly(), contextlib.redirect_stdout(io.StringIO()):
            import onnxruntime
            from insightface.app import FaceAnalysis

            providers: list[Any] = ["CPUExecutionProvider"]
            wants_cuda = device.startswith("cuda")
            if wants_cuda and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
                if hasattr(onnxruntime, "preload_dlls"):  # CUDA's libraries lie where only PyTorch looks
                    onnxruntime.preload_dlls()
                number = int(device.partition(":")[2] or 0)
                providers.insert(0, ("CUDAExecutionProvider", {"device_id": number}))
            # An absolute folder as the name is used as it is; `root` is given so that the home folder,
            # insightface's default, stays out of it.
            app = FaceAnalysis(
                name=str(pack_folder.resolve()),
                root=str(pack_folder.resolve()),
                allowed_modules=["detection", "recognition"],
                providers=providers,
            )
            app.prepare(ctx_id=0, det_size=(640, 640))
    except AssertionError as error:  # how insightface says that there is no detector
        raise ModelUnavailableError(
            f"no face detector among the .onnx files in {pack_folder}", again
        ) from error
    except Exception as error:  # ONNX, protobuf and ONNX Runtime each have their own errors
        raise ModelUnavailableError(
            f"the face models in {pack_folder} do not load: {_first_line(error)}", again
        ) from error
    if "recognition" not in app.models:
        raise ModelUnavailableError(f"no face recognizer among the .onnx files in {pack_folder}", again)
    return InsightFaceAnalyzer(app, pack_folder, wants_cuda=wants_cuda)


def align(picture: np.ndarray, face: Face) -> np.ndarray:
    """The crop turned and scaled so that the five key points lie where ArcFace wants them.

    Args:
        picture: [height, width, 3] uint8, BGR.

    Returns:
        [224, 224, 3] uint8, BGR; black beyond the picture's edge.
    """
    from insightface.utils.face_align import norm_crop

    with _quietly():
        return np.asarray(norm_crop(picture, face.key_points, image_size=CROP), dtype=np.uint8)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the deprecation warnings of insightface's own dependencies."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
