"""Train the distillation LoRA: four trailing DDIM steps replace twenty guided ones.

The teacher is the base with classifier-free guidance. It samples twenty DDIM steps from noise; the student is
trained to reproduce the latents at timesteps 749, 499, 249 and the end from those before, with one UNet call
each, without guidance. Identity is not involved.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.published_files import LORA_TARGETS
from training import data, low_rank, unet
from training.common import Ema, Run, autocast, descend, device, load_part, options
from training.ddim import TIMESTEPS, Ddim, GuidedDenoiser

RANK = 4
BATCH = 64
SUBSTEPS = 5
REFRESH = 12
"""Training steps per new batch of teacher trajectories."""


@torch.no_grad()
def teacher_trajectory(
    model: Any, ddim: Ddim, states: Tensor, added: dict[str, Tensor], noise: Tensor
) -> Tensor:
    """Return the latents [n, 5, 4, h, w] of a guided teacher trajectory at ``TIMESTEPS``."""
    denoiser = GuidedDenoiser(model, states, added)
    x, latents = noise, [noise]
    for start, end in pairwise(TIMESTEPS):
        times = [round(start + (end - start) * part / SUBSTEPS) for part in range(SUBSTEPS + 1)]
        for now, after in pairwise(times):
            x = ddim.step(x, denoiser.guided(x, now), now, after)
        latents.append(x)
    return torch.stack(latents, dim=1)


def kohya_name(name: str) -> str:
    """Return ``lora_unet_`` and the module name with underscores, the key format of the published files."""
    return "lora_unet_" + name.replace(".", "_")


def file_layout(additions: low_rank.Additions) -> dict[str, Tensor]:
    """Return the tensors of the LoRA file, in half precision; alpha equals the rank, so the scale is 1."""
    layout: dict[str, Tensor] = {}
    for name, (down, up) in additions.tensors().items():
        layout[f"{kohya_name(name)}.alpha"] = torch.tensor(float(RANK)).half()
        layout[f"{kohya_name(name)}.lora_down.weight"] = down.half().cpu().contiguous()
        layout[f"{kohya_name(name)}.lora_up.weight"] = up.half().cpu().contiguous()
    return layout


def trained(work: Path, size: int) -> low_rank.Additions:
    """Return the LoRA of the checkpoint, with averaged weights."""
    additions = low_rank.Additions(low_rank.inject(unet.build(size), LORA_TARGETS, RANK))
    additions.load_state_dict(load_part(work / "lora.pt", "ema"))
    return additions


def main() -> None:
    """Train within the time budget."""
    settings = options("lora", 20)
    model: Any = unet.trained(settings.work, settings.size)
    wrapped = low_rank.inject(model, LORA_TARGETS, RANK)
    additions = low_rank.Additions(wrapped).to(device())
    conditions = unet.Conditions(settings)
    optimizer = torch.optim.AdamW(additions.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    ema = Ema(additions, 0.99)
    parts = {"model": additions, "ema": ema, "optimizer": optimizer}
    run = Run(settings.work / "lora.pt", settings.minutes, parts, save_every=90)
    images = unet.CaptionedLatents(settings, data.load(settings), 500_000 + run.step)
    ddim, side = Ddim(), settings.size // 8
    # Faces are aligned in all portraits: the mean weights locate the mouth.
    weights = images.weights.mean((0, 1)).to(device())
    torch.manual_seed(settings.seed + run.step)
    gains = torch.tensor([ddim.error_gain(a, b) for a, b in pairwise(TIMESTEPS)])
    starts = torch.tensor(TIMESTEPS[:-1])
    history: list[tuple[Tensor, list[str]]] = []
    for _ in run.steps():
        if run.step % REFRESH == 0 or not history:
            texts = images.draw(BATCH, 0.05).texts
            states, added = conditions(texts)
            low_rank.enable(wrapped, False)
            trajectory = teacher_trajectory(
                model, ddim, states, added, torch.randn(BATCH, 4, side, side, device=device())
            )
            low_rank.enable(wrapped, True)
            history.append((trajectory, texts))
        # Half of each batch is from the newest trajectories, half from any.
        chosen = [history[-1], history[int(torch.randint(len(history), ()))]]
        halves = [torch.randperm(BATCH)[: BATCH // 2] for _ in chosen]
        trajectory = torch.cat(
            [latents[rows.to(latents.device)] for (latents, _), rows in zip(chosen, halves, strict=True)]
        )
        texts = [names[int(row)] for (_, names), rows in zip(chosen, halves, strict=True) for row in rows]
        states, added = conditions(texts)
        segment = torch.randint(len(TIMESTEPS) - 1, (BATCH,))
        rows = torch.arange(BATCH)
        x, target = trajectory[rows, segment], trajectory[rows, segment + 1]
        with autocast():
            predicted = model(x, starts[segment].to(x.device), states, added_cond_kwargs=added).sample.float()
        reached = torch.stack(
            [
                ddim.step(x[i], predicted[i], TIMESTEPS[int(k)], TIMESTEPS[int(k) + 1])
                for i, k in enumerate(segment)
            ]
        )
        error = (weights * (reached - target).pow(2)).mean((1, 2, 3))
        # All segments should be equally exact, but no segment may dominate the loss.
        weight = 1 / gains[segment].clamp(min=0.5).to(error.device)
        loss = (weight * error).mean()
        descend(loss, optimizer, run.rate(1.5e-3, warm_up=30))
        ema.update(additions)
        segment_errors = {f"segment{k}": float(error[segment == k].mean().detach()) for k in range(4)}
        run.log(24, loss=loss.item(), **segment_errors)


if __name__ == "__main__":
    main()
