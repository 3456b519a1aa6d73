"""Cache every training picture's latents, so that the UNet never waits for the encoder."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from training import data, decoder
from training.common import device, options, pictures_to_tensor

STYLES_EACH = 3
SLOTS = 2 + STYLES_EACH
"""Latents a portrait: the photo, the mirrored photo, and three of the seven styles, in turn."""


def content(portrait: int, slot: int) -> tuple[int, bool]:
    """Which style (0 is the photo) a slot of a portrait holds, and whether mirrored."""
    if slot < 2:
        return 0, slot == 1
    styles = len(data.STYLE_NAMES) - 1
    return 1 + (portrait * STYLES_EACH + slot - 2) % styles, (portrait // styles + slot) % 2 == 1


def path(work: Path) -> Path:
    """Where the cache lies."""
    return work / "latents.npy"


def main() -> None:
    """Fill the cache: float16 [portraits, slots, 4, s / 8, s / 8], whitened; held-out rows stay zero.

    Rows that are there already are skipped, so a killed run goes on, and a second process that is
    given ``--backwards`` meets the first in the middle.
    """
    backwards = "--backwards" in sys.argv
    settings = options("latents", 0, [argument for argument in sys.argv[1:] if argument != "--backwards"])
    if path(settings.work).exists():
        return
    portraits = data.load(settings)
    decoder.measure(settings.work, portraits)
    model = decoder.frozen(settings.work, settings.size).eval().to(device())
    side = settings.size // 8
    shape = (len(portraits.labels), SLOTS, 4, side, side)
    partial = path(settings.work).with_suffix(".partial")
    if not partial.exists():
        np.lib.format.open_memmap(partial, "w+", np.float16, shape).flush()
    values = np.lib.format.open_memmap(partial, "r+")
    for done, portrait in enumerate(portraits.train[::-1] if backwards else portraits.train):
        if values[portrait].any():
            continue
        contents = [content(int(portrait), slot) for slot in range(SLOTS)]
        pictures = np.stack(
            [portraits.pictures[portrait, style][:, :: -1 if flip else 1] for style, flip in contents]
        )
        values[portrait] = decoder.encode(model, pictures_to_tensor(pictures)).cpu().numpy()
        if done % 500 == 0:
            print(f"latents of {done} portraits", flush=True)
    values.flush()
    if partial.exists():
        partial.replace(path(settings.work))
    used = torch.from_numpy(values[portraits.train].astype(np.float32))
    print("mean", used.mean((0, 1, 3, 4)), "standard deviation", used.std((0, 1, 3, 4)))


if __name__ == "__main__":
    main()
