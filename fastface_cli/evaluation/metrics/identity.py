"""Is it the same person: similarity, verification and rank, by the recognizer that conditions the pictures
and by others that do not."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from cachetools import LRUCache, cachedmethod
from PIL import Image

from ...errors import ModelUnavailableError
from ...identity.search import bgr
from ..rows import Row
from .base import Column, Context, Needs, Sample, Scores
from .faces import Faces, faces_of
from .image_cache import CACHE_SIZE, method_key

FALSE_ACCEPTS = 0.01
"""Share of comparisons with other identities that verification may accept."""


class IdentityMetric:
    """What every recognizer is asked. A subclass says how a picture becomes a vector and how two compare."""

    name: str
    summary: str
    columns: tuple[Column, ...]
    needs: Needs

    def __init__(self) -> None:
        self._embeddings: LRUCache[bytes, np.ndarray | None] = LRUCache(CACHE_SIZE)

    def load(self, context: Context) -> None:
        """See `Metric`."""
        raise NotImplementedError

    def describe(self, picture: Image.Image) -> np.ndarray | None:
        """The vector of the face in a picture, [d] float32; None where there is none."""
        raise NotImplementedError

    @staticmethod
    def compare(pictures: np.ndarray, photos: np.ndarray) -> np.ndarray:
        """Similarities, [n, d] and [m, d] -> [n, m]: cosines of unit vectors."""
        found: np.ndarray = pictures.astype(np.float64) @ photos.astype(np.float64).T
        return found

    def score(self, samples: Sequence[Sample]) -> list[Scores]:
        """See `Metric`."""
        return [self._score(sample) for sample in samples]

    def vectors(self, samples: Sequence[Sample]) -> list[dict[str, np.ndarray]]:
        """See `RunMetric`: `picture` and `photo`."""
        found = []
        for sample in samples:
            vectors = {"picture": self.embedding(sample.picture), "photo": self.embedding(sample.reference)}
            found.append({name: vector for name, vector in vectors.items() if vector is not None})
        return found

    def finish(
        self, rows: Sequence[Row], vectors: Mapping[str, Mapping[str, np.ndarray]]
    ) -> dict[str, Scores]:
        """See `RunMetric`: verification and rank, for each recipe (and stress) by itself, so that adding a
        recipe to a run changes no number of another."""
        groups: dict[tuple[str, str | None], list[Row]] = {}
        for row in rows:
            groups.setdefault((row.recipe, row.stress), []).append(row)
        found: dict[str, Scores] = {}
        for group in groups.values():
            found.update(self._against_others(group, vectors))
        return found

    def embedding(self, image: Image.Image | None) -> np.ndarray | None:
        """Return the cached result of `describe`; None without an image."""
        return None if image is None else self._cached(image)

    @cachedmethod(lambda self: self._embeddings, key=method_key)
    def _cached(self, image: Image.Image) -> np.ndarray | None:
        return self.describe(image)

    def similarity(self, one: np.ndarray | None, other: np.ndarray | None) -> float | None:
        """Of two vectors; None where one is missing."""
        if one is None or other is None:
            return None
        return float(self.compare(one[None], other[None])[0, 0])

    def _score(self, sample: Sample) -> Scores:
        made, photo = self.embedding(sample.picture), self.embedding(sample.reference)
        own = self.similarity(made, photo)
        held_out = self.similarity(made, self.embedding(sample.held_out))
        return {
            self._column(""): own,
            self._column("_zero"): 0.0 if made is None and photo is not None else own,
            self._column("_held_out"): held_out,
            self._column("_copy"): None if own is None or held_out is None else own - held_out,
        }

    def _against_others(
        self, rows: Sequence[Row], vectors: Mapping[str, Mapping[str, np.ndarray]]
    ) -> dict[str, Scores]:
        """Each picture against the photos of all identities, its own and the others'."""
        photos: dict[str, np.ndarray] = {}
        for row in rows:
            if "photo" in (named := vectors.get(row.key, {})):
                photos.setdefault(row.identity, named["photo"])
        found: dict[str, Scores] = {}
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
            found[row.key] = self._verdict(verified=False, first=False)
        if not seen:
            return found
        pictures = np.stack([vectors[row.key]["picture"] for row in seen])
        alike = self.compare(pictures, np.stack([photos[name] for name in names]))
        own = np.array([names.index(row.identity) for row in seen])
        verified, first = verify(alike, own), rank_first(alike, own)
        for row, is_verified, is_first in zip(seen, verified, first, strict=True):
            found[row.key] = self._verdict(verified=bool(is_verified), first=bool(is_first))
        return found

    def _verdict(self, *, verified: bool, first: bool) -> Scores:
        return {self._column("_verified"): float(verified), self._column("_rank1"): float(first)}

    def _column(self, ending: str) -> str:
        return self.name + ending


def verify(alike: np.ndarray, own: np.ndarray, false_accepts: float = FALSE_ACCEPTS) -> np.ndarray:
    """Which pictures would be taken for their person at a fixed rate of false accepts.

    The threshold is the lowest at which at most that share of the comparisons with other identities is
    accepted. With fewer comparisons than 1 / rate none is: the verdict is then stricter than asked.

    Args:
        alike: [n, m], similarity of n pictures to the photos of m identities, at least 2.
        own: [n], the identity of each picture.

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
    """Which pictures are more similar to their own identity than to any other: [n, m], [n] -> [n] bool."""
    mine = alike[np.arange(len(own)), own]
    found: np.ndarray = (alike >= mine[:, None]).sum(axis=1) == 1
    return found


def identity_columns(name: str, title: str, by: str) -> tuple[Column, ...]:
    """The columns of a recognizer.

    Args:
        name: its metric.
        title: heading.
        by: what compares, for the legend.
    """
    similar = f"Similarity of the face to the reference photo, {by}; pictures without a face are left out."
    zero = "The same with 0 for a picture in which no face is found, so that losing the face costs."
    verified = (
        f"Pictures taken for their person at a threshold that accepts {FALSE_ACCEPTS:.0%} of the comparisons "
        "with the other identities of the run; without a face: not."
    )
    rank = "Pictures more similar to their own reference than to any other identity's; without a face: not."
    held_out = "Similarity to a photo of the same person that did not condition."
    copy = (
        "Similarity to the reference less similarity to the held-out photo: what comes from the photo and "
        "not from the person."
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
    """ID similarity by the recognizer that conditions, detection rate and face ratio."""

    name = "id"
    summary = "ID similarity by the recognizer that conditions, detection rate, face ratio"
    needs = Needs(roles=("face",))
    columns = (
        *identity_columns("id", "ID", "cosine of the embeddings that also condition the pictures"),
        Column("face_found", "face found", True, "share", "Pictures in which a face is found."),
        Column(
            "face_ratio",
            "face ratio",
            None,
            "share",
            "Area of the face's box over the picture's, 0 without a face.",
        ),
    )
    _faces: Faces

    def load(self, context: Context) -> None:
        """See `Metric`."""
        self._faces = faces_of(context)

    def describe(self, picture: Image.Image) -> np.ndarray | None:
        """See `IdentityMetric`: [512], unit norm."""
        face = self._faces.find(picture)
        return None if face is None else self._faces.analyzer.embed(bgr(picture), face)

    def _score(self, sample: Sample) -> Scores:
        found = self.embedding(sample.picture) is not None
        ratio = self._faces.ratio(sample.picture)
        return {**super()._score(sample), "face_found": float(found), "face_ratio": ratio}


class AdaFaceIdentity(IdentityMetric):
    """ID similarity by AdaFace IR-101 trained on WebFace12M: other data and another loss than the recognizer
    that conditions; faces are found and aligned by the same detector."""

    name = "adaface"
    summary = "ID similarity by AdaFace IR-101, which conditions nothing"
    needs = Needs(artifacts=("adaface-ir101",), roles=("face",))
    columns = identity_columns("adaface", "ID (AdaFace)", "cosine of AdaFace IR-101 embeddings")
    SIDE: ClassVar[int] = 112
    _faces: Faces
    _session: Any

    def load(self, context: Context) -> None:
        """See `Metric`."""
        self._faces = faces_of(context)
        self._session = open_onnx(context.paths["adaface-ir101"], context.device)

    def describe(self, picture: Image.Image) -> np.ndarray | None:
        """See `IdentityMetric`: [512], unit norm."""
        from insightface.utils.face_align import norm_crop

        face = self._faces.find(picture)
        if face is None:
            return None
        crop = norm_crop(bgr(picture), face.key_points, image_size=self.SIDE)
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
        "dlib", "ID (dlib)", "1 less the distance of dlib's descriptors; photos of one person are above 0.4"
    )
    SMALL: ClassVar[int] = 256
    """Pictures whose shorter side has fewer pixels are enlarged to that: the detector sees faces from 80."""
    _dlib: Any

    def load(self, context: Context) -> None:
        """See `Metric`."""
        import dlib

        # The package of the model files imports setuptools' retired pkg_resources; only its folder is needed.
        found = importlib.util.find_spec("face_recognition_models")
        if found is None or found.origin is None:
            raise ModelUnavailableError(
                "the weights of dlib are not installed", "pip install 'fastface-cli[dlib]'"
            )
        folder = Path(found.origin).parent / "models"
        self._dlib = dlib
        self._detector = dlib.get_frontal_face_detector()
        self._landmarks = dlib.shape_predictor(str(folder / "shape_predictor_5_face_landmarks.dat"))
        self._network = dlib.face_recognition_model_v1(
            str(folder / "dlib_face_recognition_resnet_model_v1.dat")
        )

    @staticmethod
    def compare(pictures: np.ndarray, photos: np.ndarray) -> np.ndarray:
        """See `IdentityMetric`: 1 less the Euclidean distance, which dlib's descriptors are trained for."""
        from scipy.spatial.distance import cdist

        found: np.ndarray = 1 - cdist(pictures, photos)
        return found

    def describe(self, picture: Image.Image) -> np.ndarray | None:
        """See `IdentityMetric`: [128]; the largest face counts."""
        scale = max(1.0, self.SMALL / min(picture.size))
        if scale > 1:
            size = (round(picture.width * scale), round(picture.height * scale))
            picture = picture.resize(size, Image.Resampling.BICUBIC)
        pixels = np.array(picture)
        boxes = self._detector(pixels, 0)
        if not boxes:
            return None
        largest = max(boxes, key=lambda box: box.area())
        points = self._landmarks(pixels, largest)
        return np.array(self._network.compute_face_descriptor(pixels, points), np.float32)


def open_onnx(path: Path, device: str) -> Any:
    """An ONNX Runtime session, on the GPU where it can.

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
            "fetch it again with: fastface download",
        ) from error
