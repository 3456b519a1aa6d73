"""Measure the overhead of the sampling loop over its model calls, with the pocket recipes.

    python benchmarks/loop.py [--recipe pocket-fastface] [--repeat 15]

For every image, the time of the complete generation is divided by the time inside the calls of the text
encoders, the image encoder, the identity projection, the UNet and the VAE of the same run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import torch

from fastface_cli import FastFace
from fastface_cli.app.pipeline import Pipeline, Request
from fastface_cli.identity.identity import Identity


class ModelCallTimer:
    """Measure the time inside the calls of all models."""

    def __init__(self, pipeline: Pipeline) -> None:
        parts = pipeline.parts
        self.seconds = 0.0
        for owner, name in (
            (parts.text_encoder, "forward"),
            (parts.text_encoder_2, "forward"),
            (parts.image_encoder, "forward"),
            (pipeline.projection, "forward"),
            (parts.unet, "forward"),
            (parts.vae, "decode"),
        ):
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, call: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = call(*args, **kwargs)
            self.seconds += time.perf_counter() - began
            return result

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--recipe", default="pocket-fastface")
    parser.add_argument("--repeat", type=int, default=15)
    options = parser.parse_args()
    pipeline = FastFace(options.recipe, device="cpu").pipeline
    rng = np.random.default_rng(0)
    embedding = rng.standard_normal((1, 512)).astype(np.float32)
    person = Identity(
        embedding / np.linalg.norm(embedding),
        rng.integers(0, 256, (1, 224, 224, 3), dtype=np.uint8),
        np.ones(1, np.float32),
    )
    timer = ModelCallTimer(pipeline)
    inside, total = [], []
    for run in range(options.repeat + 2):
        timer.seconds = 0.0
        began = time.perf_counter()
        next(pipeline.generate([Request("a woman smiling", run, person)]))
        seconds = time.perf_counter() - began
        if run >= 2:  # the first runs warm the caches
            inside.append(timer.seconds)
            total.append(seconds)
    ratio = statistics.median(t / i for t, i in zip(total, inside, strict=True))
    print(f"recipe {options.recipe}, {options.repeat} images, {torch.get_num_threads()} threads")
    print(f"complete generation       {statistics.median(total) * 1000:8.1f} ms (median)")
    print(f"inside model calls        {statistics.median(inside) * 1000:8.1f} ms")
    print(f"generation / model calls  {ratio:8.3f}")


if __name__ == "__main__":
    main()
