"""The cost of an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..rows import Row
from .base import Column, Context, Needs, Sample, Scores

if TYPE_CHECKING:
    import numpy as np


class Cost:
    """Latency and UNet samples, as the run noted them."""

    name = "cost"
    summary = "seconds and UNet samples per image, as recorded by the run"
    columns = (
        Column("seconds", "time", False, "s", "Generation time, without loading."),
        Column("unet_samples", "UNet samples", False, "", "Samples that went through the UNet."),
    )
    needs = Needs()

    def load(self, context: Context) -> None:
        """See `Metric`: nothing."""

    def score(self, samples: Sequence[Sample]) -> list[Scores]:
        """See `Metric`: nothing is measured on the image."""
        return [{} for _ in samples]

    def vectors(self, samples: Sequence[Sample]) -> list[dict[str, np.ndarray]]:
        """See `RunMetric`: none."""
        return [{} for _ in samples]

    def finish(
        self, rows: Sequence[Row], vectors: Mapping[str, Mapping[str, np.ndarray]]
    ) -> dict[str, Scores]:
        """See `RunMetric`."""
        return {
            row.key: {"seconds": row.seconds, "unet_samples": row.unet_samples}
            for row in rows
            if row.file is not None
        }
