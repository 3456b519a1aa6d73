"""The four steps in which the product draws, for the stages that learn from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from training import unet
from training.common import autocast, device

STATIONS = (999, 749, 499, 249, -1)
"""Trailing timesteps of four steps, and the end."""
GUIDANCE = 4.0
"""Of the text: what distillation works into the weights."""


class Walk:
    """DDIM without randomness between any two timesteps of SDXL's schedule."""

    def __init__(self) -> None:
        alphas = unet.schedule().alphas_cumprod
        # The end of the walk is the first entry, not 1: ``set_alpha_to_one`` is false in SDXL's config.
        self.alphas = torch.cat([alphas, alphas[:1]]).to(device())

    def signal_and_noise(self, timestep: int) -> tuple[Tensor, Tensor]:
        """Square roots of alpha and of one minus alpha; timestep -1 is the end."""
        alpha = self.alphas[timestep]
        return alpha.sqrt(), (1 - alpha).sqrt()

    def step(self, x: Tensor, noise: Tensor, start: int, end: int) -> Tensor:
        """Where x [n, 4, h, w] at ``start`` goes when its noise is ``noise``."""
        a, b = self.signal_and_noise(start)
        c, d = self.signal_and_noise(end)
        return c * (x - b * noise) / a + d * noise

    def lever(self, start: int, end: int) -> float:
        """How far an error of 1 in the noise moves the step's end."""
        a, b = self.signal_and_noise(start)
        c, d = self.signal_and_noise(end)
        return float((d - c * b / a).abs())


class Guide:
    """A model's noise without and with some texts; people, where there are any, are in both."""

    def __init__(
        self, model: Any, states: Tensor, added: dict[str, Tensor], people: Tensor | None = None
    ) -> None:
        self.model = model
        pooled = added["text_embeds"]
        self.added = {
            "text_embeds": torch.cat([torch.zeros_like(pooled), pooled]),
            "time_ids": added["time_ids"].repeat(2, 1),
        }
        texts = torch.cat([torch.zeros_like(states), states])
        self.context: Any = texts if people is None else (texts, [people.repeat(2, 1, 1)[:, None]])

    @torch.no_grad()
    def __call__(self, x: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
        """x [n, 4, h, w] -> noise of the same shape, without and with the texts."""
        at = torch.full((2 * len(x),), timestep, device=x.device)
        with autocast():
            noise = self.model(x.repeat(2, 1, 1, 1), at, self.context, added_cond_kwargs=self.added).sample
        blind, seeing = noise.float().chunk(2)
        return blind, seeing

    def guided(self, x: Tensor, timestep: int) -> Tensor:
        """The noise with the texts guided at GUIDANCE."""
        blind, seeing = self(x, timestep)
        return blind + GUIDANCE * (seeing - blind)
