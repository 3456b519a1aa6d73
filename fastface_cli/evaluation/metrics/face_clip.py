"""Face-CLIP score: does the face show the style that the prompt asks for? CLIP on the face crop alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from cachetools import LRUCache, cachedmethod
from PIL import Image

from ...identity.analyzer import Box
from ...scorers.cache import CACHE_SIZE, method_key
from ...scorers.clip import Clip
from .aesthetic import broken, read_pickle
from .base import Column, Context, Needs, Sample, Scores
from .clip import CLIP_L14, hub_clip
from .mtcnn import Mtcnn

NETWORKS = ("mtcnn-pnet", "mtcnn-rnet", "mtcnn-onet")


class FaceClip:
    """Cosine similarity of the face crop (MTCNN's largest box) and the prompt up to its first `;`, by CLIP
    ViT-L/14. None unless both the photo and the image show a face.

    The published code passes pixels in 0..255 to a preprocessing step that expects [-1, 1]. `fcs_published`
    reproduces that bug; `fcs` does not.
    """

    name = "face-clip"
    summary = "Face-CLIP score: the face crop against the style in the prompt, corrected and as published"
    columns = (
        Column(
            "fcs",
            "FCS",
            True,
            "",
            "Cosine similarity of the face crop and the prompt (the part before ';') by CLIP ViT-L/14.",
        ),
        Column(
            "fcs_published",
            "FCS, as published",
            True,
            "",
            "The same with the bug of the published code, which passes pixels in the wrong range; only for "
            "comparison with published tables.",
        ),
    )
    needs = Needs(artifacts=(*NETWORKS, CLIP_L14))
    clip: Clip
    mtcnn: Mtcnn
    """Both are set by `load`."""

    def __init__(self) -> None:
        self._boxes: LRUCache[bytes, Box | None] = LRUCache(CACHE_SIZE)

    def load(self, context: Context) -> None:
        """See `Metric`."""
        files = [context.paths[name] for name in NETWORKS]
        states = [read_pickle(file, "MTCNN") for file in files]
        try:
            self.mtcnn = Mtcnn(states[0], states[1], states[2], context.device)
        except ValueError as error:
            raise broken(files[0].parent, "MTCNN", error) from error
        self.clip = hub_clip(context, CLIP_L14)

    def score(self, samples: Sequence[Sample]) -> list[Scores]:
        """See `Metric`."""
        return [self._score(sample) for sample in samples]

    def _score(self, sample: Sample) -> Scores:
        scores: Scores = {"fcs": None, "fcs_published": None}
        if sample.reference is None:
            return scores
        photo_box, image_box = self._box(sample.reference), self._box(sample.image)
        if photo_box is None or image_box is None:
            return scores
        text = self.clip.texts([sample.prompt.split(";")[0]])[0]
        photo_crops, image_crops = crops(sample.reference, photo_box), crops(sample.image, image_box)
        for name in scores:
            if photo_crops[name].size and image_crops[name].size:
                published = name == "fcs_published"
                scores[name] = float(self._embed(image_crops[name], published=published) @ text)
        return scores

    @cachedmethod(lambda self: self._boxes, key=method_key)
    def _box(self, image: Image.Image) -> Box | None:
        return self.mtcnn.largest(image)

    def _embed(self, crop: np.ndarray, *, published: bool) -> np.ndarray:
        import torch

        pixels = torch.from_numpy(np.ascontiguousarray(crop)).permute(2, 0, 1).float()
        vector: np.ndarray = self.clip.tensors([pixels if published else pixels / 127.5 - 1])[0]
        return vector


def crops(image: Image.Image, box: Box) -> dict[str, np.ndarray]:
    """Return the face crop of each column as [height, width, 3] uint8; empty if the box is outside the image.

    The published code slices with the unclipped box: a corner beyond the left or upper edge is negative and
    therefore counts from the opposite edge.
    """
    pixels = np.asarray(image.convert("RGB"))
    left, top, right, bottom = (int(side) for side in box)
    return {
        "fcs": pixels[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)],
        "fcs_published": pixels[top:bottom, left:right],
    }
