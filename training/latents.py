"""Cache the latents of all training images, so that the UNet never waits for the encoder."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from training import data, decoder
from training.common import device, images_to_tensor, options

STYLES_EACH = 3
SLOTS = 2 + STYLES_EACH
"""Latents per portrait: the photo, the mirrored photo, and three of the seven styles in rotation."""


def content(portrait: int, slot: int) -> tuple[int, bool]:
    """Return the style (0 is the photo) of a slot, and whether it is mirrored."""
    if slot < 2:
        return 0, slot == 1
    styles = len(data.STYLE_NAMES) - 1
    return 1 + (portrait * STYLES_EACH + slot - 2) % styles, (portrait // styles + slot) % 2 == 1


def path(work: Path) -> Path:
    """Return the path of the cache."""
    return work / "latents.npy"


def main() -> None:
    """Write the cache: float16 [portraits, slots, 4, s / 8, s / 8], whitened; held-out rows are zero.

    Existing rows are skipped, so a killed run resumes, and a second process with ``--backwards`` can share
    the work.
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
        images = np.stack(
            [portraits.images[portrait, style][:, :: -1 if flip else 1] for style, flip in contents]
        )
        values[portrait] = decoder.encode(model, images_to_tensor(images)).cpu().numpy()
        if done % 500 == 0:
            print(f"latents of {done} portraits", flush=True)
    values.flush()
    if partial.exists():
        partial.replace(path(settings.work))
    used = torch.from_numpy(values[portraits.train].astype(np.float32))
    print("mean", used.mean((0, 1, 3, 4)), "standard deviation", used.std((0, 1, 3, 4)))


if __name__ == "__main__":
    main()
