"""Distillation: a LoRA that makes four trailing DDIM steps do the work of twenty guided ones.

The teacher is the base with classifier-free guidance. From noise it walks twenty DDIM steps; the
student learns to jump between its stations 999, 749, 499, 249 and the end, one UNet call each,
without guidance. No identity appears anywhere.
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
from training.walk import STATIONS, Guide, Walk

RANK = 4
BATCH = 64
SUBSTEPS = 5
REFRESH = 12
"""Student steps for each new batch of teacher walks."""


@torch.no_grad()
def teach(model: Any, walk: Walk, states: Tensor, added: dict[str, Tensor], noise: Tensor) -> Tensor:
    """One guided walk of the teacher: its stations, [n, 5, 4, h, w]."""
    guide = Guide(model, states, added)
    x, stations = noise, [noise]
    for start, end in pairwise(STATIONS):
        times = [round(start + (end - start) * part / SUBSTEPS) for part in range(SUBSTEPS + 1)]
        for now, after in pairwise(times):
            x = walk.step(x, guide.guided(x, now), now, after)
        stations.append(x)
    return torch.stack(stations, dim=1)


def kohya_name(name: str) -> str:
    """``lora_unet_`` and the module's name with underscores, the key format of the published files."""
    return "lora_unet_" + name.replace(".", "_")


def file_layout(additions: low_rank.Additions) -> dict[str, Tensor]:
    """The tensors of the LoRA file, half precision; alpha equals the rank, so the scale is 1."""
    layout: dict[str, Tensor] = {}
    for name, (down, up) in additions.tensors().items():
        layout[f"{kohya_name(name)}.alpha"] = torch.tensor(float(RANK)).half()
        layout[f"{kohya_name(name)}.lora_down.weight"] = down.half().cpu().contiguous()
        layout[f"{kohya_name(name)}.lora_up.weight"] = up.half().cpu().contiguous()
    return layout


def trained(work: Path, size: int) -> low_rank.Additions:
    """The additions of the checkpoint, averaged weights."""
    additions = low_rank.Additions(low_rank.inject(unet.build(size), LORA_TARGETS, RANK))
    additions.load_state_dict(load_part(work / "lora.pt", "ema"))
    return additions


def main() -> None:
    """Train within the budget."""
    settings = options("lora", 20)
    model: Any = unet.trained(settings.work, settings.size)
    wrapped = low_rank.inject(model, LORA_TARGETS, RANK)
    additions = low_rank.Additions(wrapped).to(device())
    conditions = unet.Conditions(settings)
    optimizer = torch.optim.AdamW(additions.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    ema = Ema(additions, 0.99)
    parts = {"model": additions, "ema": ema, "optimizer": optimizer}
    run = Run(settings.work / "lora.pt", settings.minutes, parts, save_every=90)
    pictures = unet.Pictures(settings, data.load(settings), 500_000 + run.step)
    walk, side = Walk(), settings.size // 8
    # Faces stand in nearly the same place everywhere: the mean portrait tells where the mouth is.
    places = pictures.places.mean((0, 1)).to(device())
    torch.manual_seed(settings.seed + run.step)
    levers = torch.tensor([walk.lever(a, b) for a, b in pairwise(STATIONS)])
    starts = torch.tensor(STATIONS[:-1])
    seen: list[tuple[Tensor, list[str]]] = []
    for _ in run.steps():
        if run.step % REFRESH == 0 or not seen:
            texts = pictures.draw(BATCH, 0.05).texts
            states, added = conditions(texts)
            low_rank.enable(wrapped, False)
            stations = teach(model, walk, states, added, torch.randn(BATCH, 4, side, side, device=device()))
            low_rank.enable(wrapped, True)
            seen.append((stations, texts))
        # Half of every batch comes from the newest walk, half from any.
        chosen = [seen[-1], seen[int(torch.randint(len(seen), ()))]]
        halves = [torch.randperm(BATCH)[: BATCH // 2] for _ in chosen]
        stations = torch.cat(
            [walks[rows.to(walks.device)] for (walks, _), rows in zip(chosen, halves, strict=True)]
        )
        texts = [names[int(row)] for (_, names), rows in zip(chosen, halves, strict=True) for row in rows]
        states, added = conditions(texts)
        leg = torch.randint(len(STATIONS) - 1, (BATCH,))
        rows = torch.arange(BATCH)
        x, wanted = stations[rows, leg], stations[rows, leg + 1]
        with autocast():
            predicted = model(x, starts[leg].to(x.device), states, added_cond_kwargs=added).sample.float()
        landed = torch.stack(
            [walk.step(x[i], predicted[i], STATIONS[int(k)], STATIONS[int(k) + 1]) for i, k in enumerate(leg)]
        )
        error = (places * (landed - wanted).pow(2)).mean((1, 2, 3))
        # Every leg's end should be equally exact, but no leg may drown the others.
        weight = 1 / levers[leg].clamp(min=0.5).to(error.device)
        loss = (weight * error).mean()
        descend(loss, optimizer, run.rate(1.5e-3, warm_up=30))
        ema.update(additions)
        legs = {f"leg{k}": float(error[leg == k].mean().detach()) for k in range(4)}
        run.log(24, loss=loss.item(), **legs)


if __name__ == "__main__":
    main()
