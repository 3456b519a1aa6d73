"""Measure which photos the pocket stack knows: statistics of its image encoder over the training portraits.

Writes ``world.safetensors`` into the package, and prints the distances of held-out portraits and of photos
from elsewhere, from which the threshold of ``fastface_cli.app.pocket_world`` was chosen.
"""

from __future__ import annotations

import insightface.data
import numpy as np
import skimage.data
import torch
from PIL import Image
from safetensors.torch import save_file

from fastface_cli import FastFace
from fastface_cli.app.pocket_world import FILE, distance, features
from fastface_cli.errors import NoFaceError
from fastface_cli.identity.identity import Identity, make_identity
from training import data
from training.common import options

COUNT = 1500
RIDGE = 1e-3


def main() -> None:
    """Write the statistics and print the distances."""
    settings = options("world", 0)
    portraits = data.load(settings)
    face = FastFace("pocket", device="cpu")
    analyzer, encoder = face.session.stack.analyzer(face.recipe), face.pipeline.parts.image_encoder

    def person(image: Image.Image, index: int | None = None) -> Identity | None:
        try:
            return make_identity([image], analyzer, face_index=index)
        except NoFaceError:
            return None

    def of(index: int) -> Identity | None:
        return person(Image.fromarray(np.asarray(portraits.originals[index])))

    chosen = np.random.default_rng(settings.seed).choice(portraits.train, COUNT, replace=False)
    known = torch.stack([features(encoder, identity) for i in chosen if (identity := of(int(i))) is not None])
    covariance = torch.cov(known.T)
    covariance += RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance))
    save_file({"mean": known.mean(0), "inverse_covariance": torch.linalg.inv(covariance).contiguous()}, FILE)

    held = [distance(encoder, identity) for i in portraits.held_out if (identity := of(int(i))) is not None]
    print("held-out portraits: percentiles 50, 99, 100:", np.percentile(held, [50, 99, 100]).round(1))
    group = Image.fromarray(insightface.data.get_image("t1")[:, :, ::-1])
    faces = [person(group, index) for index in range(6)]
    print("t1:", [round(distance(encoder, identity), 1) for identity in faces if identity is not None])
    astronaut = person(Image.fromarray(skimage.data.astronaut()))  # type: ignore[no-untyped-call]
    assert astronaut is not None
    print("astronaut:", round(distance(encoder, astronaut), 1))


if __name__ == "__main__":
    main()
