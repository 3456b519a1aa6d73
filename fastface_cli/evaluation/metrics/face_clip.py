"""Does the face show the style that the prompt asks for: CLIP on the face alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from ...identity.analyzer import Box
from .aesthetic import broken, read_pickle
from .base import Column, Context, Needs, Sample, Scores
from .clip import CLIP_L14, Clip, hub_clip
from .image_cache import Memory, digest
from .mtcnn import Mtcnn

NETWORKS = ("mtcnn-pnet", "mtcnn-rnet", "mtcnn-onet")


class FaceClip:
    """Cosine of the face, cut out by MTCNN's largest box, with the prompt up to its first `;`, by CLIP
    ViT-L/14; left out unless photo and picture both show a face (METHOD: evaluation, FCS).

    The published score gives pixels of 0..255 to a preprocessing that expects [-1, 1]. `fcs_published` has
    that fault, `fcs` has not.
    """

    name = "face-clip"
    summary = "Face-CLIP score: the face against the prompt's style, corrected and as published"
    columns = (
        Column(
            "fcs",
            "FCS",
            True,
            "",
            "Cosine of the face alone with the prompt (what stands before a ';') by CLIP ViT-L/14.",
        ),
        Column(
            "fcs_published",
            "FCS, as published",
            True,
            "",
            "The same with the fault of the published code, which feeds pixels of the wrong range; for "
            "comparison with published tables only.",
        ),
    )
    needs = Needs(artifacts=(*NETWORKS, CLIP_L14))
    _clip: Clip
    _mtcnn: Mtcnn

    def __init__(self) -> None:
        self._boxes: Memory[Box | None] = Memory()

    def load(self, context: Context) -> None:
        """See `Metric`."""
        files = [context.paths[name] for name in NETWORKS]
        states = [read_pickle(file, "MTCNN") for file in files]
        try:
            self._mtcnn = Mtcnn(states[0], states[1], states[2], context.device)
        except ValueError as error:
            raise broken(files[0].parent, "MTCNN", error) from error
        self._clip = hub_clip(context, CLIP_L14)

    def score(self, samples: Sequence[Sample]) -> list[Scores]:
        """See `Metric`."""
        return [self._score(sample) for sample in samples]

    def _score(self, sample: Sample) -> Scores:
        found: Scores = {"fcs": None, "fcs_published": None}
        photo, box = self._box(sample.reference), self._box(sample.picture)
        if sample.reference is None or photo is None or box is None:
            return found
        told = self._clip.texts([sample.prompt.split(";")[0]])[0]
        of_photo, of_picture = crops(sample.reference, photo), crops(sample.picture, box)
        for name in found:
            if of_photo[name].size and of_picture[name].size:
                found[name] = float(self._embed(of_picture[name], published=name == "fcs_published") @ told)
        return found

    def _box(self, picture: Image.Image | None) -> Box | None:
        if picture is None:
            return None
        return self._boxes.once(digest(picture), lambda: self._mtcnn.largest(picture))

    def _embed(self, crop: np.ndarray, *, published: bool) -> np.ndarray:
        import torch

        pixels = torch.from_numpy(np.ascontiguousarray(crop)).permute(2, 0, 1).float()
        vector: np.ndarray = self._clip.tensors([pixels if published else pixels / 127.5 - 1])[0]
        return vector


def crops(picture: Image.Image, box: Box) -> dict[str, np.ndarray]:
    """The face as [height, width, 3] uint8, by column; empty where there is nothing of it.

    The published code slices with the box as it is: a corner beyond the left or upper edge is negative and
    counts from the other edge.
    """
    pixels = np.asarray(picture.convert("RGB"))
    left, top, right, bottom = (int(side) for side in box)
    return {
        "fcs": pixels[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)],
        "fcs_published": pixels[top:bottom, left:right],
    }
