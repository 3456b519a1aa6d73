"""Face detection and recognition. This is the only module that uses InsightFace."""

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
"""Numbers in an embedding; the adapter requires this size."""
NO_RECOGNIZER = "none"
"""`Identity.recognizer` of an identity without an embedding."""
CROP = 224
"""Side of an aligned crop in pixels."""


@dataclass(frozen=True)
class Face:
    """A face in an image. Coordinates are pixels of that image."""

    box: Box
    key_points: np.ndarray
    """[5, 2] float32: eyes, tip of the nose, corners of the mouth; the left of each pair first."""
    score: float
    """Confidence of the detector, 0 to 1."""

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in pixels."""
        left, top, right, bottom = self.box
        return right - left, bottom - top

    def moved(self, dx: float, dy: float, scale: float = 1.0) -> Face:
        """The same face after the image is shifted by (dx, dy) and then scaled by `scale`."""
        left, top, right, bottom = self.box
        box = ((left + dx) * scale, (top + dy) * scale, (right + dx) * scale, (bottom + dy) * scale)
        points = ((self.key_points + np.array([dx, dy])) * scale).astype(np.float32)
        return replace(self, box=box, key_points=points)


class FaceAnalyzer(Protocol):
    """Interface of the face models. Images are [height, width, 3] uint8 in BGR order."""

    def detect(self, image: np.ndarray, size: int) -> list[Face]:
        """Detect faces, in any order, with the image scaled to fit into a square of `size` pixels."""
        ...

    def embed(self, image: np.ndarray, face: Face) -> np.ndarray:
        """Return the unit-norm embedding of one face, [512] float32."""
        ...

    def raw_embedding(self, image: np.ndarray, face: Face) -> np.ndarray:
        """Return the embedding before it is scaled to length 1, [512] float32."""
        ...


def is_detector(path: Path) -> bool:
    """Whether face models are a detector file alone, instead of a pack with a recognizer."""
    return path.suffix.lower() == ".onnx"


def has_recognizer(analyzer: FaceAnalyzer) -> bool:
    """Whether the embeddings of an analyzer distinguish people."""
    return getattr(analyzer, "recognizer", None) != NO_RECOGNIZER


class InsightFaceAnalyzer:
    """Detection and recognition of an InsightFace pack."""

    def __init__(self, app: Any, folder: Path, *, use_cuda: bool) -> None:
        self._detector = app.models["detection"]
        self._recognizer = app.models["recognition"]
        self._folder = folder
        self.recognizer: str = Path(str(app.models["recognition"].model_file)).stem
        """Name of the recognizer's file, without suffix: `w600k_r50`."""
        self.provider: str = self._recognizer.session.get_providers()[0]
        """The ONNX Runtime provider that the recognizer's session uses."""
        self.note: str | None = None
        """A message for the user, or None."""
        if use_cuda and self.provider != "CUDAExecutionProvider":
            self.note = (
                "the face models run on the CPU because this ONNX Runtime has no working CUDA; "
                "`fastface doctor --fix` replaces it with onnxruntime-gpu"
            )

    def detect(self, image: np.ndarray, size: int) -> list[Face]:
        """See `FaceAnalyzer`."""
        boxes, points = self._detector.detect(image, input_size=(size, size))
        if points is None:
            raise ModelUnavailableError(
                f"the face detector in {self._folder} returns no key points",
                "use a pack with key points, such as buffalo_l",
            )
        return [
            Face((float(row[0]), float(row[1]), float(row[2]), float(row[3])), five, float(row[4]))
            for row, five in zip(boxes, points, strict=True)
            if np.isfinite(row).all() and np.isfinite(five).all()
        ]

    def embed(self, image: np.ndarray, face: Face) -> np.ndarray:
        """See `FaceAnalyzer`."""
        raw = self.raw_embedding(image, face)
        with np.errstate(invalid="ignore"):  # of a length 0, which the caller refuses
            embedding: np.ndarray = raw / np.linalg.norm(raw)
        return embedding

    def raw_embedding(self, image: np.ndarray, face: Face) -> np.ndarray:
        """See `FaceAnalyzer`."""
        from insightface.app.common import Face as InsightFace

        record = InsightFace(kps=face.key_points)
        with _no_warnings():
            self._recognizer.get(image, record)
            embedding = np.asarray(record.embedding, dtype=np.float32)
        if embedding.shape != (EMBEDDING,):
            raise ModelUnavailableError(
                f"the face recognizer in {self._folder} gives embeddings of {embedding.size} numbers; "
                f"the adapter needs {EMBEDDING}",
                "use the face pack that the adapter was trained with: buffalo_l",
            )
        return embedding


def load_face_models(pack_folder: Path, *, device: str = "cpu") -> InsightFaceAnalyzer:
    """Load the detector and the recognizer of a face pack from its folder. Downloads nothing.

    Args:
        pack_folder: folder with the pack's .onnx files.
        device: `cuda` or `cuda:N` uses that GPU if ONNX Runtime supports it; any other value uses the CPU.

    Raises:
        ModelUnavailableError: the folder does not contain a face pack that loads.
    """
    hint = "download it again with: fastface download"
    if not any(pack_folder.glob("*.onnx")):
        raise ModelUnavailableError(f"there are no .onnx files in the face pack folder {pack_folder}", hint)
    try:
        with _no_warnings(), contextlib.redirect_stdout(io.StringIO()):
            import onnxruntime
            from insightface.app import FaceAnalysis

            providers: list[Any] = ["CPUExecutionProvider"]
            use_cuda = device.startswith("cuda")
            if use_cuda and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
                if hasattr(
                    onnxruntime, "preload_dlls"
                ):  # CUDA's libraries are in a folder that only PyTorch searches
                    onnxruntime.preload_dlls()
                number = int(device.partition(":")[2] or 0)
                providers.insert(0, ("CUDAExecutionProvider", {"device_id": number}))
            # An absolute path as the name is used unchanged. `root` is set so that insightface does not
            # use its default, the home folder.
            app = FaceAnalysis(
                name=str(pack_folder.resolve()),
                root=str(pack_folder.resolve()),
                allowed_modules=["detection", "recognition"],
                providers=providers,
            )
            app.prepare(ctx_id=0, det_size=(640, 640))
    except AssertionError as error:  # raised by insightface when there is no detector
        raise ModelUnavailableError(
            f"no face detector among the .onnx files in {pack_folder}", hint
        ) from error
    except Exception as error:  # ONNX, protobuf and ONNX Runtime raise different errors
        raise ModelUnavailableError(
            f"the face models in {pack_folder} do not load: {_first_line(error)}", hint
        ) from error
    if "recognition" not in app.models:
        raise ModelUnavailableError(f"no face recognizer among the .onnx files in {pack_folder}", hint)
    return InsightFaceAnalyzer(app, pack_folder, use_cuda=use_cuda)


def align(image: np.ndarray, face: Face) -> np.ndarray:
    """Return the face crop, rotated and scaled so that the key points are where ArcFace expects them.

    Args:
        image: [height, width, 3] uint8, BGR.

    Returns:
        [224, 224, 3] uint8, BGR; black outside the image.
    """
    from insightface.utils.face_align import norm_crop

    with _no_warnings():
        return np.asarray(norm_crop(image, face.key_points, image_size=CROP), dtype=np.uint8)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """Suppress the deprecation warnings of insightface's dependencies."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
