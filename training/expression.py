"""Train a small network that detects a smile on an aligned face: a loss for the base and the adapter.

The report detects smiles with an independent network (``generation.classifier``), on complete images.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training import captions, data, recognizer
from training.common import Ema, Run, autocast, descend, device, images_to_tensor, load_part, options

BATCH = 64
TOP = 40
"""Number of rows above the eyes, which are ignored."""


class Expression(nn.Module):
    """RGB crops [n, 3, 112, 112] in [-1, 1] -> logits of a smile, [n]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise((3, 24, 48, 64, 64)):
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.GroupNorm(4, outputs), nn.SiLU(True)]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 5 * 7, 1))

    def forward(self, crops: Tensor) -> Tensor:
        logits: Tensor = self.body(crops[:, :, TOP:])[:, 0]
        return logits


def smile_loss(logits: Tensor, smile: Tensor) -> Tensor:
    """Return the cross-entropy of logits [n] with smiles [n] of 0 or 1, a scalar. Labels are smoothed because
    those near the threshold are unreliable."""
    return F.binary_cross_entropy_with_logits(logits, 0.05 + 0.9 * smile)


def trained(work: Path) -> Expression:
    """Return the network of the checkpoint, with averaged weights, frozen."""
    model = Expression()
    model.load_state_dict(load_part(work / "expression.pt", "ema"), strict=True)
    return model.eval().requires_grad_(False).to(device())


def main() -> None:
    """Train within the time budget, on crops in every style, sharp and blurred."""
    settings = options("expression", 3)
    portraits = data.load(settings)
    facts = captions.all_facts(portraits)
    smiles = np.array([fact.smile for fact in facts])
    chances = np.where(smiles[portraits.train], 1 / smiles[portraits.train].mean(), 0.0)
    chances += np.where(~smiles[portraits.train], 1 / (~smiles[portraits.train]).mean(), 0.0)
    model = Expression().to(device())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    ema = Ema(model, 0.99)
    run = Run(
        settings.work / "expression.pt",
        settings.minutes,
        {"model": model, "ema": ema, "optimizer": optimizer},
    )
    draws = np.random.default_rng(settings.seed + 31 + run.step)
    points = portraits.key_points * (portraits.size / 256)
    right = 0.5
    for _ in run.steps():
        index = draws.choice(portraits.train, BATCH, p=chances / chances.sum())
        styles = np.where(draws.random(BATCH) < 0.5, 0, draws.integers(0, len(data.STYLE_NAMES), BATCH))
        crops = []
        for portrait, style in zip(index, styles, strict=True):
            crop = data.crop(portraits.images[portrait, style], points[portrait])
            crop = recognizer.degrade(crop, draws)
            if draws.random() < 0.5:  # predictions at noisy steps are blurred
                crop = cv2.GaussianBlur(crop, (0, 0), draws.uniform(0.5, 3.0))
            crops.append(crop[:, ::-1] if draws.random() < 0.5 else crop)
        smile = torch.from_numpy(smiles[index].astype(np.float32)).to(device())
        with autocast():
            logits = model(images_to_tensor(np.stack(crops))).float()
        loss = smile_loss(logits, smile)
        descend(loss, optimizer, run.rate(2e-3, warm_up=30))
        ema.update(model)
        right = 0.98 * right + 0.02 * float(((logits > 0) == (smile > 0.5)).float().mean())
        run.log(100, loss=loss.item(), right=right)


if __name__ == "__main__":
    main()
