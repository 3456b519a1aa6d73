"""Cache every training picture's latents, so that the UNet never waits for the encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from training import data, decoder
from training.common import device, options, pictures_to_tensor

SLOTS = len(data.STYLE_NAMES) + 1
"""Pictures a portrait: the photo, each style (mirrored for every other one), and the mirrored photo last."""


def is_mirrored(portrait: int, slot: int) -> bool:
    """Whether a slot holds the mirrored picture."""
    return slot == SLOTS - 1 or (slot > 0 and (portrait + slot) % 2 == 1)


def style_of(slot: int) -> str:
    """Name of a slot's style."""
    return data.STYLE_NAMES[slot] if slot < len(data.STYLE_NAMES) else "photo"


def path(work: Path) -> Path:
    """Where the cache lies."""
    return work / "latents.npy"


def main() -> None:
    """Fill the cache: float16 [portraits, slots, 4, s / 8, s / 8], whitened; held-out rows stay zero."""
    settings = options("latents", 0)
    portraits = data.load(settings)
    decoder.measure(settings.work, portraits)
    model = decoder.frozen(settings.work, settings.size).eval().to(device())
    side = settings.size // 8
    values = np.zeros((len(portraits.labels), SLOTS, 4, side, side), np.float16)
    for done, portrait in enumerate(portraits.train):
        pictures = np.stack([*portraits.pictures[portrait], portraits.pictures[portrait, 0]])
        for slot in range(SLOTS):
            if is_mirrored(int(portrait), slot):
                pictures[slot] = pictures[slot][:, ::-1]
        values[portrait] = decoder.encode(model, pictures_to_tensor(pictures)).cpu().numpy()
        if done % 500 == 0:
            print(f"latents of {done} portraits", flush=True)
    temporary = path(settings.work).with_suffix(".partial")
    with temporary.open("wb") as file:
        np.save(file, values)
    temporary.replace(path(settings.work))
    used = torch.from_numpy(values[portraits.train].astype(np.float32))
    print("mean", used.mean((0, 1, 3, 4)), "standard deviation", used.std((0, 1, 3, 4)))


if __name__ == "__main__":
    main()
