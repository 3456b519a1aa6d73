"""Prompt adherence: cosine similarity of the CLIP embeddings of prompt and image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ...scorers.clip import Clip, load_clip, load_pocket_clip
from .base import Column, Context, Needs, Sample, Scores


class ClipScore:
    """Cosine similarity of prompt and image; subclasses choose the CLIP model."""

    name: str
    summary: str
    columns: tuple[Column, ...]
    needs: Needs
    clip: Clip
    """Set by `load`."""

    def load(self, context: Context) -> None:
        """See `Metric`."""
        self.clip = hub_clip(context, self.needs.artifacts[0])

    def score(self, samples: Sequence[Sample]) -> list[Scores]:
        """See `Metric`."""
        texts = self.clip.texts([sample.prompt for sample in samples])
        images = self.clip.images([sample.image for sample in samples])
        return [{self.columns[0].name: float(cosine)} for cosine in (texts * images).sum(axis=1)]


def hub_clip(context: Context, artifact: str) -> Clip:
    """Return the CLIP model that all metrics of a context share."""
    return context.once(artifact, lambda: load_clip(context.paths[artifact], context.device))


CLIP_L14 = "clip-vit-large-patch14"


class ClipL14(ClipScore):
    """Cosine similarity by CLIP ViT-L/14."""

    name = "clip-l14"
    summary = "cosine similarity of prompt and image by CLIP ViT-L/14"
    columns = (Column("clip_l14", "CLIP L/14", True, "", "CLIP ViT-L/14 similarity of prompt and image."),)
    needs = Needs(artifacts=(CLIP_L14,))


class ClipB32(ClipScore):
    """Cosine similarity by CLIP ViT-B/32."""

    name = "clip-b32"
    summary = "cosine similarity of prompt and image by CLIP ViT-B/32"
    columns = (Column("clip_b32", "CLIP B/32", True, "", "CLIP ViT-B/32 similarity of prompt and image."),)
    needs = Needs(artifacts=("clip-vit-base-patch32",))


class PocketClip(ClipScore):
    """Cosine similarity by the pocket stack's own CLIP, which works offline.

    The same text tower conditions the images, so this is good enough to compare recipes but not independent.
    """

    name = "clip-pocket"
    summary = "cosine similarity of prompt and image by the pocket's own CLIP; works offline"
    columns = (
        Column(
            "clip_pocket",
            "CLIP (pocket)",
            True,
            "",
            "Cosine similarity of prompt and image by the pocket stack's own CLIP.",
        ),
    )
    needs = Needs(artifacts=("pocket-base", "pocket-clip"))
    SHARED: ClassVar[str] = "pocket clip"

    def load(self, context: Context) -> None:
        """See `Metric`."""
        base, encoder = (context.paths[name] for name in self.needs.artifacts)
        self.clip = context.once(self.SHARED, lambda: load_pocket_clip(base, encoder, context.device))
