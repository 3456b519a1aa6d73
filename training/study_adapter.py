"""Train the adapter for studying the methods: on the noise loss alone, as FaceID was.

The published adapters never saw the few-step models that they are used with, nor a loss on likeness. This
adapter is trained from scratch in the same way: at full strength, with the base model, on portraits with
added noise. The recipes use it at the published scales, 0.8 and 0.6.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from training import data, unet
from training.adapter import (
    BATCH,
    IDENTITY_DROPOUT,
    MAX_WEIGHT,
    TEXT_DROPOUT,
    VIEW_CHANCES,
    VIEWS,
    Adapter,
    empty_states,
    views,
)
from training.common import Ema, Run, autocast, descend, device, load_part, options

CHECKPOINT = "study_adapter.pt"
FILE = "ip-adapter-faceid-plusv2_pocket-study.bin"


def write(work: Path, size: int) -> Path:
    """Write the averaged weights as a FaceID-PlusV2 file; its scales are applied by the recipes."""
    adapter = Adapter(unet.build(size), scale=1.0, lora_scale=1.0)
    adapter.load_state_dict(load_part(work / CHECKPOINT, "ema"), strict=True)
    torch.save(adapter.file_layout(), work / FILE)
    return work / FILE


def main() -> None:
    """Train within the time budget."""
    settings = options("study_adapter", 90)
    portraits = data.load(settings)
    embeddings, states = views(settings, portraits)
    base: Any = unet.trained(settings.work, settings.size)
    adapter = Adapter(base, scale=1.0, lora_scale=1.0).to(device())
    conditions = unet.Conditions(settings)
    no_identity = empty_states(conditions.towers)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)
    ema = Ema(adapter, 0.998)
    run = Run(
        settings.work / CHECKPOINT, settings.minutes, {"model": adapter, "ema": ema, "optimizer": optimizer}
    )
    images = unet.CaptionedLatents(settings, portraits, 1_700_000 + run.step)
    scheduler = unet.schedule()
    torch.manual_seed(settings.seed + 17 + run.step)
    smooth = 1.0
    for _ in run.steps():
        batch = images.draw(BATCH, TEXT_DROPOUT, decoded=0)
        text_states, added = conditions(batch.texts)
        view = images.draws.choice(VIEWS, BATCH, p=VIEW_CHANCES)
        person = torch.from_numpy(embeddings[batch.index, view]).to(device())
        crops = torch.from_numpy(states[batch.index, view].astype(np.float32)).to(device())
        drop = torch.rand(BATCH, device=person.device) < IDENTITY_DROPOUT
        person[drop] = 0
        crops[drop] = no_identity
        # Identity is determined early, at high noise levels: sample more of them.
        times = (1000 * torch.rand(BATCH, device=person.device) ** 0.6).long()
        noise = torch.randn_like(batch.clean)
        with autocast():
            tokens = adapter.tokens(person, crops)
            noisy = scheduler.add_noise(batch.clean, noise, times)
            context = (text_states, [tokens[:, None]])
            predicted = base(noisy, times, context, added_cond_kwargs=added).sample.float()
        loss = unet.denoising_loss(predicted, noise, times, scheduler, batch.weights, MAX_WEIGHT)
        descend(loss, optimizer, run.rate(8e-4, warm_up=100))
        ema.update(adapter)
        smooth += 0.02 * (loss.item() - smooth)
        run.log(50, loss=smooth)
    write(settings.work, settings.size)


if __name__ == "__main__":
    main()
