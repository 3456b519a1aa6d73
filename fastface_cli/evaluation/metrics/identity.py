"""Identity similarity, verification and rank, by the conditioning recognizer and by independent ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from cachetools import LRUCache, cachedmethod
from PIL import Image

from ...errors import ModelUnavailableError
from ...identity.search import bgr
from ...scorers.cache import CACHE_SIZE, method_key
from ...scorers.dlib_recognizer import DlibRecognizer, similarities
from ..rows import Row
from .base import Column, Context, Needs, Sample, Scores
from .faces import Faces, faces_of

FALSE_ACCEPTS = 0.01
"""Share of comparisons with other identities that verification may accept."""


class IdentityMetric:
    """The metrics of a recognizer. Subclasses define the vector of an image and how vectors compare."""

    name: str
    summary: str
    columns: tuple[Column, ...]
    needs: Needs

    def __init__(self) -> None:
        self._embeddings: LRUCache[bytes, np.ndarray | None] = LRUCache(CACHE_SIZE)

    def load(self, context: Context) -> None:
        """See `Metric`."""
        raise NotImplementedError

    def describe(self, image: Image.Image) -> np.ndarray | None:
        """The vector of the face in an image, [d] float32; None without a face."""
        raise NotImplementedError

    @staticmethod
    def compare(images: np.ndarray, photos: np.ndarray) -> np.ndarray:
        """Similarities, [n, d] and [m, d] -> [n, m]: cosines of unit vectors."""
        cosines: np.ndarray = images.astype(np.float64) @ photos.astype(np.float64).T
        return cosines

    def score(self, samples: Sequence[Sample]) -> list[Scores]:
        """See `Metric`."""
        return [self._score(sample) for sample in samples]

    def vectors(self, samples: Sequence[Sample]) -> list[dict[str, np.ndarray]]:
        """See `RunMetric`: `picture` and `photo`."""
        results = []
        for sample in samples:
            vectors = {"picture": self.embedding(sample.image), "photo": self.embedding(sample.reference)}
            results.append({name: vector for name, vector in vectors.items() if vector is not None})
        return results

    def finish(
        self, rows: Sequence[Row], vectors: Mapping[str, Mapping[str, np.ndarray]]
    ) -> dict[str, Scores]:
        """See `RunMetric`: verification and rank, separately for each recipe and stress, so that adding a
        recipe to a run does not change the others."""
        groups: dict[tuple[str, str | None], list[Row]] = {}
        for row in rows:
            groups.setdefault((row.recipe, row.stress), []).append(row)
        scores: dict[str, Scores] = {}
        for group in groups.values():
            scores.update(self._against_others(group, vectors))
        return scores

    def embedding(self, image: Image.Image | None) -> np.ndarray | None:
        """Return the cached result of `describe`; None without an image."""
        return None if image is None else self._cached(image)

    @cachedmethod(lambda self: self._embeddings, key=method_key)
    def _cached(self, image: Image.Image) -> np.ndarray | None:
        return self.describe(image)

    def similarity(self, first: np.ndarray | None, second: np.ndarray | None) -> float | None:
        """Similarity of two vectors; None if one is missing."""
        if first is None or second is None:
            return None
        return float(self.compare(first[None], second[None])[0, 0])

    def _score(self, sample: Sample) -> Scores:
        image, photo = self.embedding(sample.image), self.embedding(sample.reference)
        own = self.similarity(image, photo)
        held_out = self.similarity(image, self.embedding(sample.held_out))
        return {
            self._column(""): own,
            self._column("_zero"): 0.0 if image is None and photo is not None else own,
            self._column("_held_out"): held_out,
            self._column("_copy"): None if own is None or held_out is None else own - held_out,
        }

    def _against_others(
        self, rows: Sequence[Row], vectors: Mapping[str, Mapping[str, np.ndarray]]
    ) -> dict[str, Scores]:
        """Compare each image with the photos of all identities."""
        photos: dict[str, np.ndarray] = {}
        for row in rows:
            if "photo" in (named := vectors.get(row.key, {})):
                photos.setdefault(row.identity, named["photo"])
        scores: dict[str, Scores] = {}
        names = list(photos)
        faceless = [
            row
            for row in rows
            if row.identity in photos
            and row.scores.get(self._column("_zero")) is not None
            and "picture" not in vectors.get(row.key, {})
        ]
        seen = [row for row in rows if row.identity in photos and "picture" in vectors.get(row.key, {})]
        if len(names) < 2 or not (seen or faceless):
            return {}
        for row in faceless:
            scores[row.key] = self._verdict(verified=False, first=False)
        if not seen:
            return scores
        images = np.stack([vectors[row.key]["picture"] for row in seen])
        alike = self.compare(images, np.stack([photos[name] for name in names]))
        own = np.array([names.index(row.identity) for row in seen])
        verified, first = verify(alike, own), rank_first(alike, own)
        for row, is_verified, is_first in zip(seen, verified, first, strict=True):
            scores[row.key] = self._verdict(verified=bool(is_verified), first=bool(is_first))
        return scores

    def _verdict(self, *, verified: bool, first: bool) -> Scores:
        return {self._column("_verified"): float(verified), self._column("_rank1"): float(first)}

    def _column(self, ending: str) -> str:
        return self.name + ending


def verify(alike: np.ndarray, own: np.ndarray, false_accepts: float = FALSE_ACCEPTS) -> np.ndarray:
    """Which images are verified as their person at a fixed rate of false accepts.

    The threshold is the lowest at which at most that share of the comparisons with other identities is
    accepted. With fewer comparisons than 1 / rate none is accepted: the threshold is then stricter.

    Args:
        alike: [n, m], similarity of n images to the photos of m identities, at least 2.
        own: [n], the identity of each image.

    Returns:
        [n] bool.
    """
    mine = alike[np.arange(len(own)), own]
    others = np.ones(alike.shape, bool)
    others[np.arange(len(own)), own] = False
    falling = -np.sort(-alike[others])
    accepted: np.ndarray = mine > falling[int(false_accepts * len(falling))]
    return accepted


def rank_first(alike: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Which images are more similar to their own identity than to any other: [n, m], [n] -> [n] bool."""
    mine = alike[np.arange(len(own)), own]
    first: np.ndarray = (alike >= mine[:, None]).sum(axis=1) == 1
    return first


def identity_columns(name: str, title: str, by: str) -> tuple[Column, ...]:
    """The columns of a recognizer.

    Args:
        name: its metric.
        title: heading.
        by: the measure, for the legend.
    """
    similar = f"Similarity of the face to the reference photo, {by}; images without a face are omitted."
    zero = "The same, with 0 for images without a face."
    verified = (
        f"Images verified as their person at a threshold that accepts {FALSE_ACCEPTS:.0%} of the comparisons "
        "with the other identities of the run; images without a face are not verified."
    )
    rank = (
        "Images more similar to their own reference than to any other identity's; "
        "images without a face are not."
    )
    held_out = "Similarity to a photo of the same person that was not used for conditioning."
    copy = (
        "Similarity to the reference minus similarity to the held-out photo: the part that comes from the "
        "photo, not from the person."
    )
    return (
        Column(name, title, True, "", similar),
        Column(f"{name}_zero", f"{title}, no face = 0", True, "", zero),
        Column(f"{name}_verified", f"{title}, verified", True, "share", verified),
        Column(f"{name}_rank1", f"{title}, rank 1", True, "share", rank),
        Column(f"{name}_held_out", f"{title}, held-out photo", True, "", held_out),
        Column(f"{name}_copy", f"{title}, copy bias", False, "", copy),
    )


class ConditioningIdentity(IdentityMetric):
    """ID similarity by the conditioning recognizer, detection rate and face ratio."""

    name = "id"
    summary = "ID similarity by the conditioning recognizer, detection rate, face ratio"
    needs = Needs(roles=("face",), recognizer=True)
    columns = (
        *identity_columns("id", "ID", "cosine of the embeddings that also condition the images"),
        Column("face_found", "face found", True, "share", "Images in which a face is found."),
        Column(
            "face_ratio",
            "face ratio",
            None,
            "share",
            "Area of the face box divided by that of the image; 0 without a face.",
        ),
    )
    _faces: Faces

    def load(self, context: Context) -> None:
        """See `Metric`."""
        self._faces = faces_of(context)

    def describe(self, image: Image.Image) -> np.ndarray | None:
        """See `IdentityMetric`: [512], unit norm."""
        face = self._faces.find(image)
        return None if face is None else self._faces.analyzer.embed(bgr(image), face)

    def _score(self, sample: Sample) -> Scores:
        has_face = self.embedding(sample.image) is not None
        ratio = self._faces.ratio(sample.image)
        return {**super()._score(sample), "face_found": float(has_face), "face_ratio": ratio}


class AdaFaceIdentity(IdentityMetric):
    """ID similarity by AdaFace IR-101 trained on WebFace12M: other data and another loss than the
    conditioning recognizer; faces are found and aligned by the same detector."""

    name = "adaface"
    summary = "ID similarity by AdaFace IR-101, an independent recognizer"
    needs = Needs(artifacts=("adaface-ir101",), roles=("face",))
    columns = identity_columns("adaface", "ID (AdaFace)", "cosine of AdaFace IR-101 embeddings")
    SIDE: ClassVar[int] = 112
    _faces: Faces
    _session: Any

    def load(self, context: Context) -> None:
        """See `Metric`."""
        self._faces = faces_of(context)
        self._session = open_onnx(context.paths["adaface-ir101"], context.device)

    def describe(self, image: Image.Image) -> np.ndarray | None:
        """See `IdentityMetric`: [512], unit norm."""
        from insightface.utils.face_align import norm_crop

        face = self._faces.find(image)
        if face is None:
            return None
        crop = norm_crop(bgr(image), face.key_points, image_size=self.SIDE)
        pixels = (crop.astype(np.float32) - 127.5) / 127.5  # BGR, as it was trained
        entry = self._session.get_inputs()[0].name
        vector = np.asarray(self._session.run(None, {entry: pixels.transpose(2, 0, 1)[None]})[0][0])
        unit: np.ndarray = (vector / np.linalg.norm(vector)).astype(np.float32)
        return unit


class DlibIdentity(IdentityMetric):
    """ID similarity by dlib: its own detector, landmarks and descriptors, independent of the rest in code and
    data. Its weights come with the extra, so that it works offline."""

    name = "dlib"
    summary = "ID similarity by dlib, with its own detector; works offline"
    needs = Needs(extras=("dlib",), modules=("dlib", "face_recognition_models"))
    columns = identity_columns(
        "dlib", "ID (dlib)", "1 minus the distance of dlib's descriptors; photos of one person are above 0.4"
    )
    recognizer: DlibRecognizer
    """Set by `load`."""

    def load(self, context: Context) -> None:
        """See `Metric`."""
        self.recognizer = DlibRecognizer()

    @staticmethod
    def compare(images: np.ndarray, photos: np.ndarray) -> np.ndarray:
        """See `IdentityMetric`: 1 minus the Euclidean distance, which dlib's descriptors are trained for."""
        return similarities(images, photos)

    def describe(self, image: Image.Image) -> np.ndarray | None:
        """See `IdentityMetric`: [128]; the largest face counts."""
        return self.recognizer.describe(image)


def open_onnx(path: Path, device: str) -> Any:
    """Open an ONNX Runtime session, on the GPU if possible.

    Raises:
        ModelUnavailableError: the file does not load.
    """
    import onnxruntime

    providers: list[Any] = ["CPUExecutionProvider"]
    if device.startswith("cuda") and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": int(device.partition(":")[2] or 0)}))
    try:
        return onnxruntime.InferenceSession(str(path), providers=providers)
    except Exception as error:  # ONNX Runtime's errors share no base
        raise ModelUnavailableError(
            f"{path} does not load: {(str(error).splitlines() or [''])[0]}",
            "download it again with: fastface download",
        ) from error
